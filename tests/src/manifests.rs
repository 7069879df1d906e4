//! The directory of Kubernetes YAML that agents read instead of an API server.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::mesh::Node;
use crate::mesh::Service;
use crate::netns::Netns;
use crate::pod::Pod;
use crate::topology::{PodSpec, ServiceSpec};

/// The directory. A file is replaced as a whole: an agent never reads half of one.
#[derive(Debug)]
pub struct Manifests {
    dir: PathBuf,
    /// Beside it, so that a file is written out of the agents' sight and then moved.
    staging: PathBuf,
}

impl Manifests {
    pub(crate) fn new(dir: PathBuf, staging: PathBuf) -> Result<Self> {
        fs::create_dir_all(&dir).context("create the manifests directory")?;
        fs::create_dir_all(&staging).context("create the staging directory")?;
        Ok(Self { dir, staging })
    }

    /// What `--manifests` means.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Puts `text` into the file `<name>.yaml`.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be written.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let staged = self.staging.join(name);
        fs::write(&staged, text).with_context(|| format!("write {}", staged.display()))?;
        let file = self.dir.join(format!("{name}.yaml"));
        fs::rename(&staged, &file).with_context(|| format!("write {}", file.display()))
    }

    /// Removes the file `<name>.yaml`.
    ///
    /// # Errors
    ///
    /// Fails if it is not there.
    pub fn remove(&self, name: &str) -> Result<()> {
        let file = self.dir.join(format!("{name}.yaml"));
        fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))
    }

    pub(crate) fn namespace(&self, name: &str, annotations: &[(String, String)]) -> Result<()> {
        let annotations: Value =
            annotations.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
        let namespace = json!({
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": { "name": name, "annotations": annotations },
        });
        self.write(&format!("namespace-{name}"), &yaml(&[namespace]))
    }

    pub(crate) fn nodes(&self, nodes: &[Node], zones: &[(String, String)]) -> Result<()> {
        let nodes: Vec<Value> = nodes
            .iter()
            .map(|node| {
                let zone = zones.iter().find(|(name, _)| name == node.name());
                let labels: Value = zone
                    .map(|(_, zone)| ("topology.kubernetes.io/zone".to_owned(), json!(zone)))
                    .into_iter()
                    .collect();
                let ips = node.ips().map(|ip| ("InternalIP", ip.to_string()));
                let addresses = ips.chain([("Hostname", node.name().to_owned())]);
                let addresses: Value = addresses
                    .map(|(kind, address)| json!({ "type": kind, "address": address }))
                    .collect();
                json!({
                    "apiVersion": "v1",
                    "kind": "Node",
                    "metadata": { "name": node.name(), "labels": labels },
                    "status": { "addresses": addresses },
                })
            })
            .collect();
        self.write("nodes", &yaml(&nodes))
    }

    pub(crate) fn pod(&self, spec: &PodSpec, pod: &Pod, netns: &Netns) -> Result<()> {
        self.pod_as(spec, pod, pod.uid(), netns)
    }

    /// As [`Self::pod`], under another UID.
    pub(crate) fn pod_as(&self, spec: &PodSpec, pod: &Pod, uid: &str, netns: &Netns) -> Result<()> {
        let mut annotations: Value =
            spec.annotations.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
        annotations["malla.dev/netns"] = json!(netns.path().display().to_string());
        let labels: Value =
            spec.labels.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
        let account = json!({
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": { "name": spec.service_account, "namespace": spec.namespace },
        });
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": spec.name,
                "namespace": spec.namespace,
                "uid": uid,
                "labels": labels,
                "annotations": annotations,
            },
            "spec": { "nodeName": spec.node, "serviceAccountName": spec.service_account },
            "status": {
                "phase": "Running",
                "podIP": pod.v4_ip().to_string(),
                "podIPs": [{ "ip": pod.v4_ip().to_string() }, { "ip": pod.v6_ip().to_string() }],
                "conditions": [{ "type": "Ready", "status": "True" }],
            },
        });
        self.write(&pod_file(&spec.namespace, &spec.name), &yaml(&[account, pod]))
    }

    pub(crate) fn service(
        &self,
        spec: &ServiceSpec,
        service: &Service,
        endpoints: &[&Pod],
    ) -> Result<()> {
        let name =
            |index: usize| if spec.ports.len() == 1 { String::new() } else { format!("p{index}") };
        let ports: Vec<Value> = spec
            .ports
            .iter()
            .enumerate()
            .map(|(index, (port, target))| {
                let mut value = json!({ "port": port, "targetPort": target, "protocol": "TCP" });
                if !name(index).is_empty() {
                    value["name"] = json!(name(index));
                }
                if let Some(protocol) = &spec.app_protocol {
                    value["appProtocol"] = json!(protocol);
                }
                value
            })
            .collect();
        let ips: Vec<String> = if spec.headless {
            vec!["None".to_owned()]
        } else {
            vec![service.v4_ip().to_string(), service.v6_ip().to_string()]
        };
        let annotations: Value =
            spec.annotations.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
        let mut documents = vec![json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {
                "name": spec.name,
                "namespace": spec.namespace,
                "annotations": annotations,
            },
            "spec": {
                "clusterIP": ips[0],
                "clusterIPs": ips,
                "ipFamilies": ["IPv4", "IPv6"],
                "ipFamilyPolicy": "PreferDualStack",
                "selector": { "app": spec.name },
                "ports": ports,
            },
        })];
        for (field, value) in &spec.fields {
            documents[0]["spec"][field] = value.clone();
        }
        let slice_ports: Vec<Value> = spec
            .ports
            .iter()
            .enumerate()
            .map(|(index, (_, target))| {
                json!({ "name": name(index), "port": target, "protocol": "TCP" })
            })
            .collect();
        for family in ["IPv4", "IPv6"] {
            let endpoints: Vec<Value> = endpoints
                .iter()
                .map(|pod| {
                    let ip = if family == "IPv4" {
                        pod.v4_ip().to_string()
                    } else {
                        pod.v6_ip().to_string()
                    };
                    json!({
                        "addresses": [ip],
                        "conditions": { "ready": true },
                        "nodeName": pod.node(),
                        "targetRef": {
                            "kind": "Pod",
                            "name": pod.name(),
                            "namespace": pod.namespace(),
                            "uid": pod.uid(),
                        },
                    })
                })
                .collect();
            documents.push(json!({
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": format!("{}-{}", spec.name, family.to_lowercase()),
                    "namespace": spec.namespace,
                    "labels": { "kubernetes.io/service-name": spec.name },
                },
                "addressType": family,
                "endpoints": endpoints,
                "ports": slice_ports,
            }));
        }
        self.write(&format!("service-{}-{}", spec.namespace, spec.name), &yaml(&documents))
    }
}

/// The file of a pod, without `.yaml`.
pub(crate) fn pod_file(namespace: &str, name: &str) -> String {
    format!("pod-{namespace}-{name}")
}

/// `documents` as people write them: block style, strings quoted.
fn yaml(documents: &[Value]) -> String {
    let mut text = String::new();
    for document in documents {
        text.push_str("---\n");
        block(document, 0, &mut text);
    }
    text
}

fn block(value: &Value, indent: usize, out: &mut String) {
    let pad = " ".repeat(indent);
    match value {
        Value::Object(map) => {
            for (key, value) in map.iter().filter(|(_, value)| !is_empty(value)) {
                push(out, format_args!("{pad}{key}:"));
                nested(value, indent + 2, out);
            }
        }
        Value::Array(items) => {
            for item in items {
                let mut inner = String::new();
                block(item, indent + 2, &mut inner);
                // The dash takes the place of the first line's indentation.
                push(out, format_args!("{pad}- {}", inner.trim_start()));
            }
        }
        scalar => push(out, format_args!("{pad}{scalar}\n")),
    }
}

fn nested(value: &Value, indent: usize, out: &mut String) {
    match value {
        Value::Array(items) if items.is_empty() => out.push_str(" []\n"),
        Value::Object(_) | Value::Array(_) => {
            out.push('\n');
            block(value, indent, out);
        }
        scalar => push(out, format_args!(" {scalar}\n")),
    }
}

/// An empty list of endpoints means something; an empty map of annotations does not.
fn is_empty(value: &Value) -> bool {
    value.as_object().is_some_and(serde_json::Map::is_empty)
}

#[expect(clippy::expect_used, reason = "writing to a String does not fail")]
fn push(out: &mut String, text: std::fmt::Arguments<'_>) {
    out.write_fmt(text).expect("a String");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yaml_is_what_people_write() {
        let value = json!({
            "kind": "Pod",
            "metadata": { "name": "a", "labels": {} },
            "status": { "podIPs": [{ "ip": "10.0.0.1" }, { "ip": "fd00::1" }], "x": [1, "y"], "z": [] },
        });
        let expected = "---\nkind: \"Pod\"\nmetadata:\n  name: \"a\"\nstatus:\n  podIPs:\n    - ip: \"10.0.0.1\"\n    - ip: \"fd00::1\"\n  x:\n    - 1\n    - \"y\"\n  z: []\n";
        assert_eq!(yaml(&[value]), expected);
    }
}
