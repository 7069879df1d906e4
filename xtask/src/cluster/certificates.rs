//! Who is who in the cluster: its authority, and a key with a certificate for everybody.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::cluster::net;
use crate::cluster::state::Cluster;

/// The cluster's keys and certificates, all in one directory that only root can read.
#[derive(Debug)]
pub(crate) struct Pki {
    dir: PathBuf,
}

impl Pki {
    /// Makes the authority, and the key that service-account tokens are signed with.
    ///
    /// # Errors
    ///
    /// Fails with what openssl says.
    pub(crate) fn create(cluster: &Cluster) -> Result<Self> {
        let this = Self { dir: cluster.dir.join("pki") };
        fs::create_dir(&this.dir).context("create the directory of keys")?;
        // Signs certificates of pods too, by the controller manager.
        openssl(
            Command::new("openssl").args(["req", "-x509", "-nodes", "-days", "30"]).args(EC).args(
                [
                    "-subj",
                    "/CN=malla test cluster",
                    "-addext",
                    "keyUsage=critical,keyCertSign,cRLSign",
                    "-keyout",
                    &this.path("ca.key"),
                    "-out",
                    &this.path("ca.crt"),
                ],
            ),
        )?;
        this.issue("api-server", "/CN=kube-apiserver", &api_server_names())?;
        this.issue("admin", "/O=system:masters/CN=admin", "")?;
        // What the API server shows to kubelets, for `exec` and `logs`.
        this.issue("to-kubelet", "/O=system:masters/CN=kube-apiserver", "")?;
        for name in ["kube-controller-manager", "kube-scheduler", "kube-proxy"] {
            this.issue(name, &format!("/CN=system:{name}"), "")?;
        }
        openssl(Command::new("openssl").args(["genpkey", "-algorithm", "EC"]).args([
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-out",
            &this.path("tokens.key"),
        ]))?;
        openssl(Command::new("openssl").args(["pkey", "-pubout"]).args([
            "-in",
            &this.path("tokens.key"),
            "-out",
            &this.path("tokens.pub"),
        ]))?;
        for n in 1..=cluster.nodes {
            let names = format!("IP:{},IP:{},DNS:node-{n}", net::node(n), net::node_6(n));
            let subject = format!("/O=system:nodes/CN=system:node:node-{n}");
            this.issue(&format!("node-{n}"), &subject, &names)?;
        }
        Ok(this)
    }

    /// One of its files.
    pub(crate) fn path(&self, file: &str) -> String {
        self.dir.join(file).display().to_string()
    }

    /// A kubeconfig for the holder of the certificate `name`.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be written.
    pub(crate) fn kubeconfig(&self, file: &Path, name: &str, server: &str) -> Result<()> {
        let embed = |file: String| -> Result<String> {
            // RFC 4648 section 4, on one line.
            let mut encode = Command::new("openssl");
            let text = openssl(encode.args(["base64", "-A", "-in", &file]))?;
            String::from_utf8(text).with_context(|| format!("encode {file}"))
        };
        let text = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "malla",
            "clusters": [{"name": "malla", "cluster": {
                "server": server,
                "certificate-authority-data": embed(self.path("ca.crt"))?,
            }}],
            "users": [{"name": name, "user": {
                "client-certificate-data": embed(self.path(&format!("{name}.crt")))?,
                "client-key-data": embed(self.path(&format!("{name}.key")))?,
            }}],
            "contexts": [{"name": "malla", "context": {"cluster": "malla", "user": name}}],
        });
        private(file, &format!("{text:#}\n"))
    }

    fn issue(&self, name: &str, subject: &str, names: &str) -> Result<()> {
        let mut command = Command::new("openssl");
        command.args(["req", "-x509", "-nodes", "-days", "30"]).args(EC).args(["-subj", subject]);
        command.args(["-CA", &self.path("ca.crt"), "-CAkey", &self.path("ca.key")]);
        command.args(["-addext", "basicConstraints=critical,CA:FALSE"]);
        command.args(["-addext", "keyUsage=critical,digitalSignature"]);
        command.args(["-addext", "extendedKeyUsage=serverAuth,clientAuth"]);
        if !names.is_empty() {
            command.args(["-addext", &format!("subjectAltName={names}")]);
        }
        command.args(["-keyout", &self.path(&format!("{name}.key"))]);
        openssl(command.args(["-out", &self.path(&format!("{name}.crt"))])).map(drop)
    }
}

/// Makes a file that only its owner can read.
///
/// # Errors
///
/// Fails if it cannot be written.
pub(crate) fn private(file: &Path, text: &str) -> Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;

    let mut options = fs::OpenOptions::new();
    let opened = options.write(true).create(true).truncate(true).mode(0o600).open(file);
    let written = opened.and_then(|mut opened| opened.write_all(text.as_bytes()));
    written.with_context(|| format!("write {}", file.display()))
}

const EC: [&str; 4] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"];

fn api_server_names() -> String {
    let service = "kubernetes.default.svc";
    format!(
        "IP:127.0.0.1,IP:{},IP:{},DNS:kubernetes,DNS:kubernetes.default,DNS:{service},\
         DNS:{service}.cluster.local",
        net::CONTROL,
        net::API_SERVICE,
    )
}

/// What `openssl` prints.
fn openssl(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.output().context("start openssl")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "openssl: {}", said.trim());
    Ok(output.stdout)
}
