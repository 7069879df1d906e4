//! `deploy/`, for tests. [`Deployment::shipped`] is what users apply, as it is and as they do.
//! [`Deployment::read`] differs: it is in a namespace of its own, what belongs to no namespace has names of
//! its own, and the signer may, so that several can be there at once. Whoever applies it may change
//! more, and says so (`Agents::deploy`: the image's name and settings).

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::{env, fs};

use anyhow::{Context as _, Result};
use serde_json::{Deserializer, Value, json};

use super::{Cluster, fed, read};

/// What users apply.
const DIRECTORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/");

/// What the file says, and a test has one of its own.
const NAMESPACE: &str = "malla-system";
const SIGNER: &str = "malla.dev/workload";

/// Kinds that belong to no namespace, and so need a name of their own.
const OF_THE_CLUSTER: [&str; 4] = [
    "ClusterRole",
    "ClusterRoleBinding",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
];

/// The objects of the file. Those outside of the namespace are removed when dropped.
#[derive(Debug)]
pub struct Deployment {
    system: Cluster,
    objects: Vec<Value>,
}

impl Deployment {
    /// Reads the file, for a new namespace. With `signer` only requests that are addressed to it are
    /// answered, and so none of other tests.
    ///
    /// # Errors
    ///
    /// Fails if the file is no manifest.
    pub fn read(signer: Option<&str>) -> Result<Self> {
        let system = Cluster::namespace()?;
        let text = text()?.replace(NAMESPACE, system.name());
        let text = text.replace(SIGNER, signer.unwrap_or(SIGNER));
        let mut this = Self::parse(system, &text)?;
        for object in &mut this.objects {
            rename(object, this.system.name());
        }
        Ok(this)
    }

    /// Reads the file, to apply the directory as it is.
    ///
    /// # Errors
    ///
    /// Fails if the file is no manifest.
    pub fn shipped() -> Result<Self> {
        Self::parse(Cluster::named(NAMESPACE)?, &text()?)
    }

    fn parse(system: Cluster, text: &str) -> Result<Self> {
        let mut create = system.command();
        create.args(["create", "--dry-run=client", "--output=json", "--filename=-"]);
        let printed = fed(&mut create, text)?;
        let mut objects = Vec::new();
        for object in Deserializer::from_slice(&printed).into_iter::<Value>() {
            let object = object.context("read what kubectl printed")?;
            match object["items"].as_array() {
                Some(items) => objects.extend(items.iter().cloned()),
                None => objects.push(object),
            }
        }
        Ok(Self { system, objects })
    }

    /// The namespace that it is for.
    pub fn system(&self) -> &Cluster {
        &self.system
    }

    /// The object of a kind, to be changed before it is applied.
    #[expect(clippy::panic, reason = "a test that names what the file does not have is wrong")]
    pub fn object(&mut self, kind: &str) -> &mut Value {
        let found = self.objects.iter_mut().find(|object| object["kind"] == kind);
        found.unwrap_or_else(|| panic!("no {kind} in the file"))
    }

    /// Applies everything but `without` these kinds.
    ///
    /// # Errors
    ///
    /// Fails with what `kubectl` says.
    pub fn apply(&self, without: &[&str]) -> Result<()> {
        let is_wanted = |object: &&Value| !without.iter().any(|kind| object["kind"] == *kind);
        let items: Vec<_> = self.objects.iter().filter(is_wanted).collect();
        self.system.apply(&json!({"apiVersion": "v1", "kind": "List", "items": items}))
    }
}

impl Deployment {
    /// Applies the directory.
    ///
    /// # Errors
    ///
    /// Fails with what `kubectl` says.
    pub fn apply_directory(&self) -> Result<()> {
        self.system.kubectl(&["apply", "--filename", DIRECTORY]).map(drop)
    }

    /// Deletes what the directory says, and waits until it is gone.
    ///
    /// # Errors
    ///
    /// Fails with what `kubectl` says.
    pub fn delete_directory(&self) -> Result<()> {
        self.system.kubectl(&["delete", "--filename", DIRECTORY, "--timeout=120s"]).map(drop)
    }
}

impl Drop for Deployment {
    fn drop(&mut self) {
        for object in &self.objects {
            let kind = object["kind"].as_str().unwrap_or_default();
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            if OF_THE_CLUSTER.contains(&kind) {
                self.system.kubectl(&["delete", "--wait=false", kind, name]).ok();
            }
        }
    }
}

fn text() -> Result<String> {
    let file = Path::new(DIRECTORY).join("daemonset.yaml");
    fs::read_to_string(&file).with_context(|| file.display().to_string())
}

fn rename(object: &mut Value, namespace: &str) {
    let named = |name: &Value| json!(format!("{namespace}-{}", name.as_str().unwrap_or_default()));
    if OF_THE_CLUSTER.iter().any(|kind| object["kind"] == *kind) {
        object["metadata"]["name"] = named(&object["metadata"]["name"]);
    }
    if object["roleRef"]["kind"] == "ClusterRole" {
        object["roleRef"]["name"] = named(&object["roleRef"]["name"]);
    }
    if object["kind"] == "ValidatingAdmissionPolicyBinding" {
        object["spec"]["policyName"] = named(&object["spec"]["policyName"]);
    }
}

/// Somebody who asks the API with a token.
#[derive(Debug)]
pub struct User(Cluster);

impl User {
    /// Runs `kubectl` as this user.
    ///
    /// # Errors
    ///
    /// Fails with what it says.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.0.kubectl(args)
    }

    /// Makes an object, and returns it.
    ///
    /// # Errors
    ///
    /// Fails with what `kubectl` says.
    pub fn create(&self, object: &Value) -> Result<Value> {
        let file = env::temp_dir().join(format!(
            "malla-{}-{}.json",
            std::process::id(),
            self.0.kubeconfig.file_name().unwrap_or_default().display()
        ));
        fs::write(&file, object.to_string()).context("write an object")?;
        let mut command = self.0.command();
        command.args(["create", "--output=json", "--filename"]).arg(&file).stdin(Stdio::null());
        let made = read(&mut command);
        fs::remove_file(&file).context("remove an object's file")?;
        serde_json::from_str(&made?).context("read what kubectl printed")
    }

    /// Puts an object in the place of the one at this path of the API, as it is.
    ///
    /// # Errors
    ///
    /// Fails with what the API server says.
    pub fn put(&self, path: &str, object: &Value) -> Result<()> {
        let mut command = self.0.command();
        command.args(["replace", "--raw", path, "--filename", "-"]);
        fed(&mut command, &object.to_string()).map(drop)
    }

    /// Asks for a pod of this user's namespace to be evicted.
    ///
    /// # Errors
    ///
    /// Fails with what the API server says.
    pub fn evict(&self, pod: &str) -> Result<()> {
        self.0.evict(pod)
    }

    /// The file that says how this user reaches the API.
    pub fn kubeconfig(&self) -> &Path {
        &self.0.kubeconfig
    }
}

impl Drop for User {
    fn drop(&mut self) {
        fs::remove_file(&self.0.kubeconfig).ok();
    }
}

impl Cluster {
    /// A token of a service account, bound to the object of this kind and name, such as a pod.
    ///
    /// # Errors
    ///
    /// Fails with what `kubectl` says.
    pub fn token(&self, account: &str, bound: Option<(&str, &str)>) -> Result<String> {
        let mut args = vec!["create", "token", account];
        if let Some((kind, name)) = bound {
            args.extend(["--bound-object-kind", kind, "--bound-object-name", name]);
        }
        Ok(self.kubectl(&args)?.trim().to_owned())
    }

    /// Whoever has this token. `name` tells files apart.
    ///
    /// # Errors
    ///
    /// Fails if the administrator's way to the API cannot be read.
    pub fn user(&self, name: &str, token: &str) -> Result<User> {
        let config = self.kubectl(&["config", "view", "--raw", "--minify", "--output=json"])?;
        let mut config: Value = serde_json::from_str(&config).context("read the kubeconfig")?;
        config["users"][0]["user"] = json!({"token": token});
        let file = format!("malla-{}-{}-{name}.kubeconfig", std::process::id(), self.namespace);
        let kubeconfig: PathBuf = env::temp_dir().join(file);
        fs::write(&kubeconfig, config.to_string()).context("write a kubeconfig")?;
        Ok(User(Self { kubeconfig, namespace: self.namespace.clone(), is_ours: false }))
    }
}
