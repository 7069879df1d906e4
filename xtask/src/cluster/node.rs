//! A node: its files, and the process that is its first.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::cluster::certificates::{Pki, private};
use crate::cluster::net;
use crate::cluster::state::Cluster;
use crate::cluster::tools;
use crate::image;

/// What runs as process 1 of the node.
const SCRIPT: &str = include_str!("node.sh");

/// Writes the node's files, and returns the command that becomes the node when it is started in its
/// network namespace. It waits for a line on its standard input before it starts the kubelet.
///
/// # Errors
///
/// Fails if a file cannot be written.
pub(crate) fn prepare(cluster: &Cluster, pki: &Pki, number: usize) -> Result<Command> {
    let name = format!("node-{number}");
    let dir = cluster.dir.join(&name);
    let cgroup = format!("/{}", cluster.name(&name));
    let etc = dir.join("etc");
    for sub in ["kubernetes", "containerd", "cni/net.d"] {
        let sub = etc.join(sub);
        fs::create_dir_all(&sub).with_context(|| format!("create {}", sub.display()))?;
    }
    let server = format!("https://{}:6443", net::CONTROL);
    pki.kubeconfig(&etc.join("kubernetes/kubelet.conf"), &name, &server)?;
    pki.kubeconfig(&etc.join("kubernetes/kube-proxy.conf"), "kube-proxy", &server)?;
    for (from, to) in [
        ("ca.crt".to_owned(), "ca.crt"),
        (format!("{name}.crt"), "node.crt"),
        (format!("{name}.key"), "node.key"),
    ] {
        let pem = fs::read_to_string(pki.path(&from)).with_context(|| format!("read {from}"))?;
        private(&etc.join("kubernetes").join(to), &pem)?;
    }
    write(&etc.join("kubernetes/kubelet.yaml"), &kubelet(&cgroup))?;
    write(&etc.join("containerd/config.toml"), &containerd()?)?;
    write(&etc.join("cni/net.d/10-pods.conflist"), &pods(number))?;
    write(&etc.join("hostname"), &format!("{name}\n"))?;
    let hosts = format!("127.0.0.1 localhost\n::1 localhost\n{} {name}\n", net::node(number));
    write(&etc.join("hosts"), &hosts)?;

    let mut archives = Vec::new();
    for image in image::EVERY_NODE {
        archives.push(image.archive()?.display().to_string());
    }
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"]);
    command.args(["--", "sh", "-c", SCRIPT, &name]);
    command.env("NAME", &name).env("DIR", &dir).env("CGROUP", cgroup);
    command.env("ADDRESSES", format!("{},{}", net::node(number), net::node_6(number)));
    command.env("PODS", net::PODS).env("IMAGES", archives.join(" "));
    command.env("KUBERNETES", tools::KUBERNETES.dir()?);
    command.env("CONTAINERD", tools::CONTAINERD.dir()?);
    command.env("RUNC", tools::RUNC.dir()?).env("CNI", tools::CNI.dir()?);
    Ok(command)
}

/// A kubelet that neither fights with the other node's nor with the machine.
fn kubelet(cgroup: &str) -> String {
    let config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": "/etc/kubernetes/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": "/etc/kubernetes/node.crt",
        "tlsPrivateKeyFile": "/etc/kubernetes/node.key",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": cgroup,
        "enforceNodeAllocatable": [],
        // A machine may have controllers of version 1 beside version 2.
        "failCgroupV1": false,
        "failSwapOn": false,
        // Lowering one's own needs a capability that a container of ours may not have.
        "oomScoreAdj": 0,
        "clusterDNS": [net::DNS_SERVICE],
        "clusterDomain": "cluster.local",
        "resolvConf": "",
        "volumePluginDir": "/var/lib/kubelet/plugins-of-volumes",
        // The disk is the machine's, and may be as full as it likes.
        "evictionHard": {
            "memory.available": "50Mi",
            "nodefs.available": "1%",
            "nodefs.inodesFree": "1%",
            "imagefs.available": "1%",
            "imagefs.inodesFree": "1%",
        },
        // Or images vanish from the node after some minutes, and there is nowhere to pull them from.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
    });
    // JSON is YAML.
    format!("{config:#}\n")
}

fn containerd() -> Result<String> {
    let pause = image::PAUSE.name()?;
    // `restrict_oom_score_adj`: without CAP_SYS_RESOURCE every sandbox would otherwise die at
    // "failed to update oom_score_adj".
    Ok(format!(
        r#"version = 3

[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = "{pause}"

[plugins.'io.containerd.cri.v1.runtime']
restrict_oom_score_adj = true

[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ["/opt/cni/bin"]
conf_dir = "/etc/cni/net.d"

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
BinaryName = "/opt/runc/runc"
SystemdCgroup = false
"#
    ))
}

/// Pods with an address of either family, and no translation: they see each other's addresses.
fn pods(number: usize) -> String {
    let config = json!({
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [
            {
                "type": "ptp",
                "ipMasq": false,
                "ipam": {
                    "type": "host-local",
                    "ranges": [
                        [{"subnet": net::pods(number)}],
                        [{"subnet": net::pods_6(number)}],
                    ],
                    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
                },
            },
            {"type": "portmap", "backend": "nftables", "capabilities": {"portMappings": true}},
        ],
    });
    format!("{config:#}\n")
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("write {}", file.display()))
}
