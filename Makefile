# make            build everything into bin/
# make demo       a cluster on this machine: pods on three nodes talk
# make test       the tests; needs Go, git and make
# make help       the rest

GO       ?= go
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS  := -s -w -X culvert/internal/cli.version=$(VERSION)
BUILD    := CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)'
TOOL     := $(GO) tool -modfile=internal/tools/go.mod
PLUGINS  := github.com/containernetworking/plugins/plugins
# What culvert-cni is under other names. Not dhcp, which would make each start of
# any of them slower by half (net/rpc).
DELEGATES := $(addprefix $(PLUGINS)/main/,bridge loopback) \
             $(addprefix $(PLUGINS)/ipam/,host-local static) \
             $(addprefix $(PLUGINS)/meta/,portmap bandwidth tuning)
# Executions, not a time: up to Go 1.26 a target that is cut by time may fail with "context
# deadline exceeded" (golang/go#75804).
FUZZTIME ?= 20000x

# Tests are compiled as the programs are, without C and without paths: what both contain is
# then compiled once. Only the race detector needs C.
TEST := CGO_ENABLED=0 $(GO) test -trimpath

# Packages that test-system needs: a container engine, and other network tools to check
# culvert against.
AXE := 4.11.1
SYSTEM_PACKAGES := etcd-server docker.io containerd runc util-linux iproute2 procps iputils-ping iptables nftables iperf3 chromium ethtool tcpdump clang llvm libbpf-dev gcc libc6-dev

.PHONY: all build
all: build

## build: culvert, culvert-cni (which is the CNI plugins in bin/cni, too) and culvert-etcd
build:
	@mkdir -p bin/cni
	$(BUILD) -o bin/culvert .
	$(GO) run ./cni/multicall -out bin/.multicall $(DELEGATES)
	$(BUILD) -overlay bin/.multicall/overlay.json -o bin/culvert-cni ./cni/culvert-cni
	$(BUILD) -o bin/culvert-etcd ./subnet/etcd/culvert-etcd
	$(BUILD) -o bin/cni/ $(PLUGINS)/ipam/dhcp
	@for name in $(notdir $(DELEGATES)); do ln -sfn ../culvert-cni bin/cni/$$name; done

.PHONY: demo
## demo: connect pods on three nodes on this machine, then remove everything
demo: build
	bin/culvert demo

.PHONY: check
## check: the quick gate: format, vet, staticcheck, go mod tidy, short tests with the race detector (needs a C compiler)
check: build
	@test -z "$$($(TOOL) gofumpt -l . | tee /dev/stderr)" || { echo 'run: make format' >&2; exit 1; }
	CGO_ENABLED=0 $(GO) vet -trimpath -tags "system kubernetes release" ./...
	CGO_ENABLED=0 GOFLAGS="$$($(GO) env GOFLAGS) -trimpath" $(TOOL) staticcheck -tags "system kubernetes release" ./...
	$(GO) mod tidy -diff
	CULVERT_BIN=$(CURDIR)/bin $(GO) test -race -short $$($(GO) list ./... | grep -v '^culvert/test$$')
	$(TEST) -run 'Imports|PackagesSay|EveryDropReason' ./test

# How many tests that mostly wait run side by side, each in a lab of its own (t.Parallel). What
# measures, loads the machine or has short time limits runs alone.
PARALLEL ?= 4

.PHONY: test
## test: all tests that need only Go, git and make, and a short run of the fuzz targets
test: build
	CULVERT_BIN=$(CURDIR)/bin $(TEST) -p 1 -parallel $(PARALLEL) -timeout 30m ./...
	@$(MAKE) --no-print-directory fuzz

.PHONY: fuzz
## fuzz: each fuzz target for FUZZTIME (20000x: that many executions)
fuzz:
	@set -e; for p in $$(git grep -l '^func Fuzz' -- '*_test.go' | xargs -n1 dirname | sort -u); do \
		for f in $$(grep -ho '^func Fuzz[A-Za-z0-9_]*' $$p/*_test.go | cut -d' ' -f2); do \
			echo "fuzzing $$p $$f"; \
			$(TEST) ./$$p -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x >fuzz.log 2>&1 || { cat fuzz.log; rm -f fuzz.log; exit 1; }; \
			tail -n 1 fuzz.log; rm -f fuzz.log; \
		done; \
	done

CHAOS := ^TestChaos|^TestP1ForgedTunnelPackets|^TestStrangers|^TestDifferential

.PHONY: test-chaos
## test-chaos: attacks and faults under traffic, their short forms (part of make test; three minutes)
test-chaos: build
	CULVERT_BIN=$(CURDIR)/bin $(TEST) -count 1 -timeout 20m -v -run '$(CHAOS)' ./test

.PHONY: test-chaos-long
## test-chaos-long: the same in their long forms: 10,000 packets a case, 200 kills, 10,000 nodes that join and leave, 1,000,000 packets by both datapaths (90 minutes)
test-chaos-long: build
	CULVERT_BIN=$(CURDIR)/bin CULVERT_PACKETS=10000 CULVERT_KILLS=200 CULVERT_CHURN=5000 CULVERT_FLOOD=60 CULVERT_DAY=1440 CULVERT_FAIRNESS=5000 CULVERT_DIFFERENTIAL=1000000 $(TEST) -count 1 -timeout 2h -v -run '$(CHAOS)' ./test

.PHONY: soak
## soak: two hours (CULVERT_SOAK) of mixed traffic with leases that come and go: memory, threads, descriptors and the kernel's objects must not grow
soak: build
	CULVERT_BIN=$(CURDIR)/bin CULVERT_SOAK=$(or $(CULVERT_SOAK),2h) $(TEST) -count 1 -timeout 5h -v -run '^TestSoak$$' ./test

.PHONY: mutation
## mutation: takes checks away one at a time, and expects tests to fail (half an hour)
mutation: build
	CULVERT_BIN=$(CURDIR)/bin $(GO) test -tags mutation -count 1 -timeout 3h -v -run '^TestMutations$$' ./test

FUZZ_SHARE ?= 1
.PHONY: fuzz-long
## fuzz-long: every fuzz target by executions, 10^8 for packets and 10^7 for others, in a plain loop; FUZZ_SHARE=0.001 does a thousandth (two hours of one core in full)
fuzz-long:
	internal/tools/fuzz-long $(FUZZ_SHARE)

.PHONY: vuln
## vuln: known vulnerabilities in what a release would contain (govulncheck, with the newest database that the Go module proxy has)
vuln:
	@internal/tools/vuln $(RELEASE_GO)

CLANG      ?= clang
LLVM_STRIP ?= llvm-strip
BPF_CFLAGS := -O2 -g -Wall -Werror -mcpu=v2 -fdebug-prefix-map=$(CURDIR)=. -I/usr/include/$(shell gcc -print-multiarch 2>/dev/null)

BPF_OUT    ?= backend/fastpath/bpf

.PHONY: bpf
## bpf: compile the eBPF programs (needs clang, llvm, libbpf-dev); make test-system checks that the committed ones are up to date
bpf:
	$(CLANG) $(BPF_CFLAGS) -target bpfel -c backend/fastpath/bpf/fastpath.c -o $(BPF_OUT)/fastpath_el.o
	$(CLANG) $(BPF_CFLAGS) -target bpfeb -c backend/fastpath/bpf/fastpath.c -o $(BPF_OUT)/fastpath_eb.o
	$(LLVM_STRIP) -g $(BPF_OUT)/fastpath_el.o $(BPF_OUT)/fastpath_eb.o

NIGHTLY_ROUNDS ?= 200
# Leases in etcd, and nodes that join at once: with two cores more than 300 do not finish.
NIGHTLY_SCALE ?= 5000,300

.PHONY: nightly
## nightly: the long tests: the model test 200 times (NIGHTLY_ROUNDS), etcd unreachable for ten minutes, random host events, nodes that join 5,000 leases; then test-vm-old, test-chaos-long, mutation, vuln, test-release and reproducible (six hours)
nightly: build
	CULVERT_BIN=$(CURDIR)/bin CULVERT_MODEL_ROUNDS=$(NIGHTLY_ROUNDS) CULVERT_MODEL_SEED=$$(date +%s) $(TEST) -count 1 -timeout 2h -v -run '^TestModel$$' ./test
	CULVERT_BIN=$(CURDIR)/bin CULVERT_ETCD_AWAY=10m $(TEST) -count 1 -timeout 1h -v -run '^TestFaultsUnderTraffic$$' ./test
	CULVERT_BIN=$(CURDIR)/bin CULVERT_TEST_PINGS=3000 $(TEST) -count 1 -v -run '^TestReplace$$' ./test
	for seed in 1 2 3 4 5 6 7 8 9 10; do CULVERT_BIN=$(CURDIR)/bin CULVERT_SEED=$$seed CULVERT_EVENTS=1000 $(TEST) -count 1 -timeout 1h -v -run '^TestRandomHostEvents$$' ./test || exit 1; done
	CULVERT_BIN=$(CURDIR)/bin CULVERT_PEERS=1000 $(TEST) -count 1 -timeout 1h -v -run '^TestManyPeers$$' ./test
	CULVERT_BIN=$(CURDIR)/bin CULVERT_SCALE=$(NIGHTLY_SCALE) $(TEST) -count 1 -timeout 1h -v -run '^TestScale$$' ./test
	CULVERT_PODS=100 $(MAKE) --no-print-directory test-kubernetes
	$(MAKE) --no-print-directory test-vm-old test-chaos-long mutation vuln test-release reproducible

.PHONY: test-system
## test-system: the tests that need Debian packages: install them (as root), then test with -tags system
test-system: build
	@echo 'needs: $(SYSTEM_PACKAGES)'
	internal/tools/install-packages $(SYSTEM_PACKAGES)
	CULVERT_BIN=$(CURDIR)/bin CULVERT_FULL=1 $(TEST) -p 1 -count 1 ./cni ./internal/host ./backend/... ./subnet/etcd
	CULVERT_BIN=$(CURDIR)/bin CULVERT_FULL=1 $(TEST) -p 1 -count 1 ./test -run Services
	command -v npm >/dev/null || internal/tools/install-packages npm
	npm install --silent --no-audit --no-fund --no-save --prefix bin/npm axe-core@$(AXE)
	CULVERT_BIN=$(CURDIR)/bin $(TEST) -tags system -count 1 ./test/system/...

# Packages that test-vm needs.
VM_PACKAGES := qemu-system-x86 busybox-static cpio kmod

.PHONY: test-vm
## test-vm: tests in a virtual machine with Debian's kernel: ipip devices, a lossy network, clock steps, an older kernel
test-vm: build
	@echo 'needs: $(VM_PACKAGES)'
	internal/tools/install-packages $(VM_PACKAGES)
	@mkdir -p bin/vm
	$(TEST) -c -tags vm -o bin/vm/test.test ./test
	$(TEST) -c -o bin/vm/ipip.test ./backend/ipip
	cd test && ../internal/tools/vm env CULVERT_VM=1 CULVERT_BIN=$(CURDIR)/bin sh -c \
		'set -e; $(CURDIR)/bin/vm/test.test -test.v -test.short -test.run "TestVM|TestEveryMechanism|TestRepairs$$|TestMixedCluster|TestFastPathOracle|TestFastPathIPIP|TestIPIP|TestTheUnitsPriority|TestChaosInjection/ipip"; cd ../backend/ipip && $(CURDIR)/bin/vm/ipip.test -test.v'

.PHONY: test-vm-old
## test-vm-old: both datapaths on the oldest kernel that culvert supports, Debian 11's Linux 5.10, in a virtual machine
test-vm-old: build
	@echo 'needs: $(VM_PACKAGES)'
	internal/tools/install-packages $(VM_PACKAGES)
	@mkdir -p bin/vm
	$(TEST) -c -tags vm -o bin/vm/test.test ./test
	cd test && VM_SUITE=bullseye ../internal/tools/vm env CULVERT_VM=1 CULVERT_BIN=$(CURDIR)/bin $(CURDIR)/bin/vm/test.test -test.v -test.run TestVMKernel

KUBERNETES := bin/kubernetes

# What test-kubernetes needs beyond Go: what a node of a cluster has.
KUBERNETES_PACKAGES := containerd runc util-linux iproute2 iptables nftables

.PHONY: kubernetes
## kubernetes: build Kubernetes' programs from their Go modules into bin/kubernetes (15 minutes on one core, then cached)
kubernetes:
	@mkdir -p $(KUBERNETES)
	cd internal/tools/kubernetes && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w -X k8s.io/component-base/version.gitVersion=v1.34.2' \
		-o $(CURDIR)/$(KUBERNETES)/ $(addprefix k8s.io/kubernetes/cmd/,kube-apiserver kubectl kube-controller-manager kube-scheduler kubelet kube-proxy)

.PHONY: manifests
## manifests: render deploy/kubernetes into single files; run it after a change there
manifests: kubernetes
	$(KUBERNETES)/kubectl kustomize deploy/kubernetes >deploy/kubernetes/culvert.yaml
	$(KUBERNETES)/kubectl kustomize deploy/kubernetes/etcd >deploy/kubernetes/culvert-etcd.yaml

.PHONY: test-kubernetes
## test-kubernetes: tests of the Kubernetes store against a real API server, and of a two-node cluster with kubelets; CULVERT_PODS=100 starts that many pods at once
test-kubernetes: build kubernetes
	@echo 'needs: $(KUBERNETES_PACKAGES)'
	internal/tools/install-packages $(KUBERNETES_PACKAGES)
	CULVERT_BIN=$(CURDIR)/bin CULVERT_KUBERNETES=$(CURDIR)/$(KUBERNETES) $(TEST) -tags kubernetes -p 1 -count 1 -timeout 15m ./subnet/kube ./deploy
	CULVERT_BIN=$(CURDIR)/bin CULVERT_KUBERNETES=$(CURDIR)/$(KUBERNETES) $(TEST) -tags kubernetes -count 1 -timeout 15m -v -run Kubernetes ./test

.PHONY: bench
## bench: measure all datapaths, workloads and underlays (45 minutes; resumable) and write docs/benchmarks.md
bench: build
	@mkdir -p bench/results
# Write the docs last: a changed tree is another version, and --resume refuses its report.
	bin/culvert bench --resume bench/results/full.json --duration 400ms --warmup 150ms $(BENCH_FLAGS); failed=$$?; \
	test -e bench/results/scale.json || bin/culvert bench scale --rounds 7 --json=bench/results/scale.json --docs docs || exit; \
	bin/culvert bench report bench/results/full.json --html bench/results/full.html --docs docs >/dev/null && exit $$failed

.PHONY: bench-fast-path
## bench-fast-path: measure the fast path with pods as ends (10 minutes; resumable) and write docs/benchmarks.md
bench-fast-path: build
	@mkdir -p bench/results
	bin/culvert bench --preset fast-path --resume bench/results/fast-path.json $(BENCH_FLAGS) && \
	bin/culvert bench report bench/results/fast-path.json --html bench/results/fast-path.html --docs docs >/dev/null

MICRO := CGO_ENABLED=0 $(GO) test ./encap -run '^$$' -bench . -benchtime 200ms -count 6

.PHONY: bench-micro
## bench-micro: run the packet loop's microbenchmarks and compare with bench/micro/baseline.txt
bench-micro:
	@mkdir -p bench/results
	$(MICRO) >bench/results/micro.txt
	@cd bench && $(GO) tool -modfile=$(CURDIR)/internal/tools/go.mod benchstat micro/baseline.txt results/micro.txt

.PHONY: bench-micro-baseline
## bench-micro-baseline: rewrite bench/micro/baseline.txt
bench-micro-baseline:
	@mkdir -p bench/micro
	$(MICRO) >bench/micro/baseline.txt

.PHONY: image
## image: build the container image from bin/, tagged with the version and with the tag that deploy/kubernetes uses
image: build
	docker build -t culvert:$(VERSION) -t culvert:v0.1.0 .

# For which processors a release is, of which time its files are, and by which Go it is
# made: the same everywhere, whatever Go is installed ("local" takes that one).
ARCHES     ?= amd64 arm64 arm riscv64 s390x ppc64le
RELEASE_GO ?= go1.26.11
RELEASE = VERSION=$(VERSION) ARCHES='$(ARCHES)' SOURCE_DATE_EPOCH=$(shell git log -1 --format=%ct) GOTOOLCHAIN=$(RELEASE_GO)

.PHONY: print-delegates
print-delegates:
	@echo $(DELEGATES)

.PHONY: release
## release: binaries, packages, image, bills of materials, licences and checksums for ARCHES, into bin/release (12 minutes of one core; docs/releasing.md)
release:
	rm -rf bin/release
	@$(RELEASE) internal/tools/release/build bin/release

# Programs that test-release needs beside Go: it looks into packages and installs them.
RELEASE_PACKAGES := rpm cpio systemd util-linux

.PHONY: test-release
## test-release: make release, then look into what it made, and install, upgrade and remove the packages on a machine with systemd (as root; installs Debian packages)
test-release: build release
	@echo 'needs: $(RELEASE_PACKAGES)'
	internal/tools/install-packages $(RELEASE_PACKAGES)
	CULVERT_BIN=$(CURDIR)/bin CULVERT_RELEASE=$(CURDIR)/bin/release CULVERT_VERSION=$(VERSION) CGO_ENABLED=0 $(GO) test -tags release -count 1 -v -run '^TestRelease(Programs|Checksums|Image|Packages|Install)$$' ./test

.PHONY: reproducible
## reproducible: a release for ARCHES, built twice from what is committed, in two directories and with build caches of their own, has the same hashes; what make release left in bin/release is the first of the two
reproducible:
	@$(RELEASE) internal/tools/release/reproducible bin/release

.PHONY: test-rules
## test-rules: the alert rules and the dashboard, by Prometheus' engine, over real daemons (two minutes)
test-rules: build
	cd deploy/prometheus/rulestest && CULVERT_BIN=$(CURDIR)/bin $(TEST) -count 1 ./...

# The packages whose tests need no more of a kernel than qemu-user passes on. Left out are
# those that open other netlink families than rtnetlink (internal/host, backend/...: nftables,
# eBPF), start daemons and etcd (internal/daemon, internal/cli, subnet/etcd, test), or measure (bench).
ARCH_PACKAGES := ./encap ./subnet ./subnet/kept ./subnet/kube ./subnet/contract ./internal/api/... ./internal/statefile ./internal/image ./backend ./backend/hostgw
# ./cni, which sets up network namespaces, is left out for s390x: qemu-user does not convert all of their netlink
# messages for a big-endian program.
# Those of internal/host that need only rtnetlink run for arm64.
ARCH_HOST := InterruptedDump|EmptyAnswer|OneOwner|ManyAtOnce|OwnerThat|FindUnderlay|Choose|Hold
# Left out of the packages are tests that need seccomp's notifications, ethtool's netlink, bridges' neighbours and clsact.
ARCH_SKIP := ^TestWriteIsDurable$$|^TestOnLink$$|^TestReservationsOfAnEarlierBoot$$|^TestClsact$$
# Beside them everything is compiled for 32 bits.
.PHONY: test-arch
## test-arch: the tests of the portable packages for arm64, s390x (big endian) and arm (32 bits), under qemu-user
test-arch:
	internal/tools/install-packages qemu-user-static
	GOARCH=arm CGO_ENABLED=0 $(GO) build ./... && GOARCH=s390x CGO_ENABLED=0 $(GO) build ./...
	for arch in s390x:s390x arm:arm arm64:aarch64; do \
		echo "== $${arch%:*}"; \
		CULVERT_QEMU_USER=1 CGO_ENABLED=0 GOARCH=$${arch%:*} GOARM=7 $(GO) test -vet=off -short -count 1 -timeout 20m -p 1 -skip '$(ARCH_SKIP)' -exec qemu-$${arch#*:}-static $$([ $$arch = s390x:s390x ] && echo $(ARCH_PACKAGES) || echo $(ARCH_PACKAGES) ./cni) || exit 1; \
	done
	CULVERT_QEMU_USER=1 CGO_ENABLED=0 GOARCH=arm64 $(GO) test -vet=off -short -count 1 -timeout 5m -exec qemu-aarch64-static -run '$(ARCH_HOST)' ./internal/host

.PHONY: format
## format: run gofumpt on all files
format:
	$(TOOL) gofumpt -w .

.PHONY: clean
## clean: remove bin/
clean:
	rm -rf bin

.PHONY: help
## help: this list
help:
	@sed -n 's/^## //p' Makefile
