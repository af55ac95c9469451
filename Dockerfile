# The image contains only static binaries, which `make image` builds first.
FROM scratch
COPY bin/culvert bin/culvert-cni bin/culvert-etcd /
COPY bin/cni/ /cni/
ENTRYPOINT ["/culvert"]
CMD ["run"]
