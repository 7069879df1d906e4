#!/bin/busybox sh
# The first process in the emulator: what a node has (cgroup v2 alone, a bpffs, modules), then the tests.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts && mount -t devpts pts /dev/pts
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
ip link set lo up
for module in veth dummy nf_tables tcp_diag; do modprobe "$module"; done
# On a line of its own: the firmware leaves its last one open.
echo
echo "kernel: $(uname -rm)"
/programs/mesh-agent check
echo "check: exit code $?"
cd /tmp
for tests in capture processes; do
    /programs/$tests --test-threads 2 $TESTS 2>&1
    echo "$tests: exit code $?"
done
poweroff -f
