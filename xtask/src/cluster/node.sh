# The first process of a node: a root file system of its own, containerd, kubelet, kube-proxy.
# It stays, because with it everything in its process namespace ends, and takes in orphans.
# In the environment: NAME, DIR (the node's files), CGROUP (its place in every hierarchy), ADDRESSES,
# PODS, IMAGES (archives), and the directories KUBERNETES, CONTAINERD, RUNC, CNI of the programs.
set -eu

# Nothing that is mounted on the machine is seen here, or kept from being unmounted there: other
# people's namespaces and BPF file systems would otherwise live as long as this node.
root=$DIR/root
mkdir -p "$root" "$DIR/var/log" "$DIR/containerd"
mount -t tmpfs -o mode=755 node "$root"
cd "$root"
mkdir -p dev etc mnt opt/kubernetes opt/containerd opt/runc opt/cni/bin opt/images proc root \
    run/containerd run/netns run/sysctl sys tmp var
chmod 1777 tmp
for each in bin sbin lib lib32 lib64 libx32 usr; do
    if [ -L "/$each" ]; then
        cp -P "/$each" .
    elif [ -d "/$each" ]; then
        mkdir "$each"
        mount --bind "/$each" "$each"
        mount -o remount,bind,ro "$each"
    fi
done
for each in passwd group nsswitch.conf ld.so.cache ld.so.conf protocols services; do
    if [ -e "/etc/$each" ]; then cp "/etc/$each" etc/; fi
done
cp -r "$DIR/etc/." etc/
mount --bind "$KUBERNETES" opt/kubernetes
mount --bind "$CONTAINERD" opt/containerd
mount --bind "$RUNC" opt/runc
mount --bind "$CNI" opt/cni/bin
count=0
for image in $IMAGES; do
    count=$((count + 1))
    touch "opt/images/$count.tar"
    mount --bind "$image" "opt/images/$count.tar"
done
mount --bind "$DIR/var" var
mount --bind "$DIR/containerd" run/containerd
ln -s ../run var/run 2>/dev/null || true
mount --rbind /dev dev
mount -t proc proc proc
mount -t sysfs sysfs sys
mount --rbind /sys/fs/cgroup sys/fs/cgroup
# As systemd does on a real machine; a pin on a hostPath fails with EPERM without it.
mount -t bpf bpf sys/fs/bpf
pivot_root . mnt
umount -l /mnt
cd /
# What a container mounts under a hostPath with mount propagation is seen by the others.
mount --make-rshared /
echo "$NAME" >/proc/sys/kernel/hostname

# The kubelet writes these, and they are the whole machine's: it finds them as it wants them.
shadow() {
    file=/run/sysctl/$(echo "$1" | tr / .)
    echo "$2" >"$file"
    mount --bind "$file" "/proc/sys/$1"
}
shadow vm/overcommit_memory 1
shadow vm/panic_on_oom 0
shadow kernel/panic 10
shadow kernel/panic_on_oops 1
shadow kernel/keys/root_maxkeys 1000000
shadow kernel/keys/root_maxbytes 25000000

unified=
while read -r _ target type _; do
    case $type in
    cgroup2) unified=$target && mkdir -p "$target$CGROUP" ;;
    cgroup) mkdir -p "$target$CGROUP" ;;
    esac
done </proc/mounts
# A new cpuset of version 1 is empty, and takes no process.
for each in cpuset.cpus cpuset.mems; do
    if [ -e "/sys/fs/cgroup/cpuset/$each" ]; then
        cat "/sys/fs/cgroup/cpuset/$each" >"/sys/fs/cgroup/cpuset$CGROUP/$each"
    fi
done

# A service in the cgroup that it has on a real machine (kind's names), so that what recognises the
# kubelet by it is tested as it will be.
service() {
    place=$unified$CGROUP/$1
    name=$2
    shift 2
    mkdir -p "$place"
    (
        echo 0 >"$place/cgroup.procs"
        exec "$@" >"/var/log/$name.log" 2>&1 </dev/null
    ) &
}
mkdir -p "$unified$CGROUP/init.scope"
echo 0 >"$unified$CGROUP/init.scope/cgroup.procs"
export PATH="/opt/kubernetes:/opt/containerd:/opt/runc:$PATH"

service system.slice/containerd.service containerd containerd --config /etc/containerd/config.toml
until ctr version >/dev/null 2>&1; do sleep 0.1; done
for image in /opt/images/*.tar; do
    ctr -n k8s.io images import --label io.cri-containerd.image=managed "$image"
done

# A word from outside: the API server is ready. A kubelet that asks too early waits for seconds.
read -r _
service kubelet.slice/kubelet.service kubelet kubelet --config /etc/kubernetes/kubelet.yaml \
    --kubeconfig /etc/kubernetes/kubelet.conf --hostname-override "$NAME" \
    --node-ip "$ADDRESSES" --root-dir /var/lib/kubelet --v 2
service system.slice/kube-proxy.service kube-proxy kube-proxy --proxy-mode nftables \
    --kubeconfig /etc/kubernetes/kube-proxy.conf --hostname-override "$NAME" \
    --cluster-cidr "$PODS" --conntrack-max-per-core 0 --oom-score-adj 0
while :; do
    wait
    sleep 1
done
