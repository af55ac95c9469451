# The image contains two static binaries, which `make image` builds first; /cni/*
# are other names of culvert-cni. Left out: culvert-etcd (--embedded-etcd), and the
# dhcp plugin, which is 10 MB.
FROM scratch
COPY bin/culvert bin/culvert-cni /
COPY bin/cni/ /cni/
ENTRYPOINT ["/culvert"]
CMD ["run"]
