//! The control plane: etcd, the API server, the controller manager and the scheduler.

use std::process::Command;

use anyhow::Result;

use crate::cluster::certificates::Pki;
use crate::cluster::net;
use crate::cluster::state::Cluster;
use crate::cluster::tools::KUBERNETES;

/// In a namespace that nobody else is in, so that neither certificates nor another port are needed.
const ETCD: &str = "http://127.0.0.1:2379";

/// The store. Nothing that it holds is worth waiting for a disk.
///
/// # Errors
///
/// Fails if the program cannot be found, as everything here.
pub(crate) fn etcd(cluster: &Cluster) -> Result<Command> {
    let mut command = Command::new(KUBERNETES.program("etcd")?);
    command.arg("--data-dir").arg(cluster.dir.join("etcd"));
    command.args(["--unsafe-no-fsync", "--log-level", "warn"]);
    command.args(["--listen-client-urls", ETCD, "--advertise-client-urls", ETCD]);
    Ok(command)
}

pub(crate) fn api_server(cluster: &Cluster, pki: &Pki) -> Result<Command> {
    let mut command = Command::new(KUBERNETES.program("kube-apiserver")?);
    let mut flag = |name: &str, value: &str| {
        command.arg(format!("--{name}={value}"));
    };
    flag("etcd-servers", ETCD);
    flag("advertise-address", &net::CONTROL.to_string());
    flag("secure-port", "6443");
    flag("service-cluster-ip-range", net::SERVICES);
    flag("allow-privileged", "true");
    flag("authorization-mode", "Node,RBAC");
    flag("enable-admission-plugins", "NodeRestriction");
    flag("client-ca-file", &pki.path("ca.crt"));
    flag("tls-cert-file", &pki.path("api-server.crt"));
    flag("tls-private-key-file", &pki.path("api-server.key"));
    // For API servers behind this one; without it those that ask for it complain for ever.
    flag("requestheader-client-ca-file", &pki.path("ca.crt"));
    flag("requestheader-allowed-names", "front-proxy");
    flag("cert-dir", &cluster.dir.join("etcd").display().to_string());
    flag("service-account-issuer", "https://kubernetes.default.svc.cluster.local");
    flag("service-account-key-file", &pki.path("tokens.pub"));
    flag("service-account-signing-key-file", &pki.path("tokens.key"));
    flag("kubelet-certificate-authority", &pki.path("ca.crt"));
    flag("kubelet-client-certificate", &pki.path("to-kubelet.crt"));
    flag("kubelet-client-key", &pki.path("to-kubelet.key"));
    flag("kubelet-preferred-address-types", "InternalIP");
    Ok(command)
}

pub(crate) fn controller_manager(cluster: &Cluster, pki: &Pki) -> Result<Command> {
    let mut command = managed(cluster, "kube-controller-manager")?;
    command.arg("--use-service-account-credentials");
    command.args(["--service-account-private-key-file", &pki.path("tokens.key")]);
    command.args(["--root-ca-file", &pki.path("ca.crt")]);
    command.args(["--cluster-signing-cert-file", &pki.path("ca.crt")]);
    command.args(["--cluster-signing-key-file", &pki.path("ca.key")]);
    command.args(["--cluster-cidr", net::PODS, "--service-cluster-ip-range", net::SERVICES]);
    // When the API server has been away it hears of nodes again after up to a minute. By default it takes
    // all of them for dead before, and Services have no endpoints. Where it elects a leader it ends instead,
    // and its successor gives nodes time.
    command.args(["--node-monitor-grace-period", "120s"]);
    Ok(command)
}

pub(crate) fn scheduler(cluster: &Cluster) -> Result<Command> {
    managed(cluster, "kube-scheduler")
}

/// What both that work for the API server have in common: the only one of its kind, with a
/// kubeconfig of its name.
fn managed(cluster: &Cluster, name: &str) -> Result<Command> {
    let config = cluster.dir.join(format!("{name}.conf"));
    let mut command = Command::new(KUBERNETES.program(name)?);
    for flag in ["--kubeconfig", "--authentication-kubeconfig", "--authorization-kubeconfig"] {
        command.arg(flag).arg(&config);
    }
    command.args(["--leader-elect=false", "--bind-address", "127.0.0.1"]);
    Ok(command)
}
