# The image holds static binaries and nothing else. `make image` builds them
# first.
FROM scratch
COPY bin/culvert bin/culvert-cni bin/culvert-etcd /
COPY bin/cni/ /cni/
ENTRYPOINT ["/culvert"]
CMD ["run"]
