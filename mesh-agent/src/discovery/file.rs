//! The standalone source: a directory of manifests, followed.
//!
//! `*.yaml`, `*.yml` and `*.json` directly in the directory; hidden files are left out, which also
//! covers editors' temporary files and the links inside a mounted ConfigMap.
//!
//! # Guarantees
//!
//! - One immutable snapshot at a time, and a new generation only if something changed.
//! - A file that is wrong keeps its last good objects in force, is reported once per change, and heals
//!   when corrected. The other files are not touched.
//! - A directory that disappears later keeps the last state. At the start it is an error: an agent
//!   that was told a wrong directory must not look as if the mesh were empty.
//!
//! A writer should rename a finished file into place. One that writes in place is read when it closes
//! the file, but a change of another file in that very moment may catch it halfway.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{io, panic};

use mesh_core::snapshot::Snapshot;
use mesh_core::spiffe::TrustDomain;
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::Instant;

use super::Problem;
use super::directory::Directory;
use crate::dirwatch::DirWatch;

/// What a snapshot depends on besides the manifests.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `--node`: the node this agent runs on, as manifests call it.
    pub node: Arc<str>,
    /// `--trust-domain`.
    pub trust_domain: TrustDomain,
    /// `--tunnel-port`: of every agent, unless its node says otherwise.
    pub tunnel_port: u16,
}

/// Why a directory cannot be followed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FileError {
    /// It cannot be watched: absent, no directory, or inotify's limits are reached.
    #[error(
        "watch {path}: check --manifests, and the limits fs.inotify.* if the directory is there"
    )]
    Watch {
        /// Which directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It cannot be listed.
    #[error("list {path}: check the directory's permissions")]
    List {
        /// Which directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl FileError {
    /// The `reason` label: a closed set.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Watch { .. } => "watch",
            Self::List { .. } => "list",
        }
    }
}

/// A followed directory.
#[derive(Debug)]
pub struct FileSource {
    watch: DirWatch,
    directory: Directory,
    snapshots: watch::Sender<Arc<Snapshot>>,
    problems: watch::Sender<Arc<[Problem]>>,
    confirmed: watch::Sender<Instant>,
    network_policies: watch::Sender<usize>,
}

impl FileSource {
    /// Reads `dir` once. Files in it that are wrong are problems, not errors. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// If the directory cannot be watched or listed.
    pub fn open(
        dir: &Path,
        settings: Settings,
    ) -> Result<(Self, watch::Receiver<Arc<Snapshot>>), FileError> {
        // Watched first: what changes while it is read is noticed.
        let watch =
            DirWatch::open(dir).map_err(|source| FileError::Watch { path: dir.into(), source })?;
        let mut directory = Directory::new(dir, settings);
        directory.read().map_err(|source| FileError::List { path: dir.into(), source })?;
        let (snapshots, receiver) = watch::channel(Arc::clone(&directory.snapshot));
        let problems = watch::Sender::new(directory.problems.as_slice().into());
        let confirmed = watch::Sender::new(Instant::now());
        let network_policies = watch::Sender::new(directory.network_policies());
        Ok((Self { watch, directory, snapshots, problems, confirmed, network_policies }, receiver))
    }

    /// How many NetworkPolicies the manifests hold.
    pub fn network_policies(&self) -> watch::Receiver<usize> {
        self.network_policies.subscribe()
    }

    /// What is wrong at present: for `status` and metrics.
    pub fn problems(&self) -> watch::Receiver<Arc<[Problem]>> {
        self.problems.subscribe()
    }

    /// When the directory was last read: the snapshot is what the files said then, and its age is
    /// the time since.
    pub fn confirmed(&self) -> watch::Receiver<Instant> {
        self.confirmed.subscribe()
    }

    /// Follows the directory, for ever.
    pub async fn run(self) {
        let Self { mut watch, mut directory, snapshots, problems, confirmed, network_policies } =
            self;
        loop {
            watch.changed().await;
            // Megabytes of YAML take a while: not on a thread that serves metrics and admin.
            let read = tokio::task::spawn_blocking(move || {
                let result = directory.read();
                (directory, result)
            });
            let result = match read.await {
                Ok((returned, result)) => {
                    directory = returned;
                    result
                }
                Err(ended) if ended.is_panic() => panic::resume_unwind(ended.into_panic()),
                Err(_runtime_shuts_down) => return,
            };
            directory.note(&result);
            if result.is_ok() {
                confirmed.send_replace(Instant::now());
            }
            network_policies.send_replace(directory.network_policies());
            problems.send_if_modified(|before| {
                let changed = **before != *directory.problems;
                if changed {
                    *before = directory.problems.as_slice().into();
                }
                changed
            });
            snapshots.send_if_modified(|before| {
                let changed = before.generation != directory.snapshot.generation;
                *before = Arc::clone(&directory.snapshot);
                changed
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::time::Duration;

    use tokio::task::JoinHandle;
    use tokio::time::{sleep, timeout};

    use super::*;
    use crate::dirwatch::testing::TempDir;
    use crate::discovery::manifest::MAX_BYTES;
    use crate::identity::testing::cluster_local;

    struct Followed {
        dir: TempDir,
        snapshots: watch::Receiver<Arc<Snapshot>>,
        problems: watch::Receiver<Arc<[Problem]>>,
        task: JoinHandle<()>,
    }

    fn settings() -> Settings {
        Settings { node: "a".into(), trust_domain: cluster_local(), tunnel_port: 15019 }
    }

    fn pod(name: &str, ip: &str) -> String {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\n\
             spec: {{nodeName: a}}\nstatus: {{podIPs: [{{ip: {ip}}}]}}\n"
        )
    }

    impl Followed {
        fn start(files: &[(&str, &str)]) -> Self {
            let dir = TempDir::new();
            for (name, text) in files {
                fs::write(dir.path().join(name), text).unwrap();
            }
            let (source, snapshots) = FileSource::open(dir.path(), settings()).unwrap();
            let problems = source.problems();
            Self { dir, snapshots, problems, task: tokio::spawn(source.run()) }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.path(name), text).unwrap();
        }

        fn pods(&self) -> BTreeSet<String> {
            self.snapshots.borrow().workloads().map(|w| w.name.to_string()).collect()
        }

        fn generation(&self) -> u64 {
            self.snapshots.borrow().generation
        }

        fn problems(&self) -> Vec<String> {
            self.problems.borrow().iter().map(Problem::to_string).collect()
        }

        async fn until(&self, held: impl Fn(&Self) -> bool) {
            let wait = async {
                while !held(self) {
                    sleep(Duration::from_millis(5)).await;
                }
            };
            let ended = timeout(Duration::from_secs(10), wait).await;
            ended.unwrap_or_else(|_| panic!("{:?} {:?}", self.pods(), self.problems()));
        }

        async fn until_pods(&self, names: &[&str]) {
            let names: BTreeSet<_> = names.iter().map(|name| (*name).to_owned()).collect();
            self.until(|this| this.pods() == names).await;
        }
    }

    impl Drop for Followed {
        fn drop(&mut self) {
            self.task.abort();
        }
    }

    #[tokio::test]
    async fn files_are_followed_through_write_rename_and_delete() {
        let mesh = Followed::start(&[("a.yaml", &pod("a", "10.0.0.1"))]);
        assert_eq!(mesh.generation(), 1);
        mesh.until_pods(&["a"]).await;
        mesh.write("b.yml", &pod("b", "10.0.0.2"));
        mesh.until_pods(&["a", "b"]).await;
        mesh.write("b.yml", &pod("c", "10.0.0.2"));
        mesh.until_pods(&["a", "c"]).await;
        mesh.write("new", &pod("d", "10.0.0.3"));
        fs::rename(mesh.path("new"), mesh.path("a.yaml")).unwrap();
        mesh.until_pods(&["c", "d"]).await;
        fs::rename(mesh.path("b.yml"), mesh.path("b.off")).unwrap();
        mesh.until_pods(&["d"]).await;
        let json = r#"{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "j"}}"#;
        mesh.write("j.json", json);
        mesh.until_pods(&["d", "j"]).await;
        fs::remove_file(mesh.path("a.yaml")).unwrap();
        mesh.until_pods(&["j"]).await;
    }

    #[tokio::test]
    async fn wrong_file_keeps_its_last_good_objects_is_reported_and_heals() {
        let mesh = Followed::start(&[
            ("a.yaml", &pod("a", "10.0.0.1")),
            ("b.yaml", &pod("b", "10.0.0.2")),
        ]);
        let before = mesh.generation();
        mesh.write("a.yaml", &format!("{}---\nkind: Pod\n", pod("x", "10.0.0.9")));
        mesh.until(|mesh| !mesh.problems().is_empty()).await;
        let problems = mesh.problems();
        assert!(problems[0].starts_with("a.yaml, document 2"), "{problems:?}");
        assert_eq!(problems.len(), 1);
        assert_eq!(mesh.generation(), before);

        // Other files are read on.
        mesh.write("b.yaml", &pod("c", "10.0.0.2"));
        mesh.until_pods(&["a", "c"]).await;

        mesh.write("a.yaml", &pod("x", "10.0.0.9"));
        mesh.until_pods(&["x", "c"]).await;
        mesh.until(|mesh| mesh.problems().is_empty()).await;
    }

    #[tokio::test]
    async fn generation_grows_only_if_something_changed() {
        let mesh = Followed::start(&[("a.yaml", &pod("a", "10.0.0.1"))]);
        let before = mesh.generation();
        mesh.write("a.yaml", &format!("# a comment\n{}", pod("a", "10.0.0.1")));
        mesh.write("notes.txt", "nothing");
        mesh.write(".a.yaml.swp", &pod("hidden", "10.0.0.7"));
        mesh.write("a.yaml~", &pod("backup", "10.0.0.8"));
        // A problem comes from the same pass as the rest, so it says that the pass is over.
        mesh.write("z.yaml", "wrong");
        mesh.until(|mesh| !mesh.problems().is_empty()).await;
        assert_eq!(mesh.generation(), before);
        mesh.write("b.yaml", &pod("b", "10.0.0.2"));
        mesh.until_pods(&["a", "b"]).await;
        assert_eq!(mesh.generation(), before + 1);
    }

    #[tokio::test]
    async fn object_in_two_files_counts_once_and_is_reported() {
        let mesh = Followed::start(&[
            ("a.yaml", &pod("a", "10.0.0.1")),
            ("b.yaml", &pod("a", "10.0.0.2")),
        ]);
        let problems = mesh.problems();
        assert!(problems[0].starts_with("b.yaml, document 1: Pod default/a"), "{problems:?}");
        assert!(problems[0].contains("a.yaml, document 1"), "{problems:?}");
        assert!(mesh.snapshots.borrow().workload_at("10.0.0.1".parse().unwrap()).is_some());
        fs::remove_file(mesh.path("a.yaml")).unwrap();
        mesh.until(|mesh| mesh.problems().is_empty()).await;
        assert!(mesh.snapshots.borrow().workload_at("10.0.0.2".parse().unwrap()).is_some());
    }

    #[tokio::test]
    async fn problem_of_an_object_names_its_file() {
        let text = pod("a", "10.0.0.300");
        let mesh = Followed::start(&[("first.yaml", &pod("b", "10.0.0.1")), ("pods.yaml", &text)]);
        let problem = mesh.problems.borrow()[0].clone();
        assert_eq!(problem.at, "pods.yaml, document 1");
        assert_eq!((&*problem.object, &*problem.field), ("Pod default/a", "status.podIPs"));
    }

    #[tokio::test]
    async fn what_is_missing_may_be_in_a_file_that_is_not_read() {
        let slice = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
                     metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}\nendpoints: []\n";
        let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\n\
                       spec: {clusterIP: None, ports: [{port: 80}]}\n";
        let broken = service.replace("80", "http");
        let mesh = Followed::start(&[("service.yaml", &broken), ("slice.yaml", slice)]);
        let of_slice = |mesh: &Followed| {
            mesh.problems().into_iter().find(|problem| problem.contains("no Service `web`"))
        };
        let told = of_slice(&mesh).unwrap();
        assert!(told.contains("correct service.yaml, which is not read"), "{told}");
        fs::remove_file(mesh.path("service.yaml")).unwrap();
        mesh.until(|mesh| of_slice(mesh).is_some_and(|told| !told.contains("service.yaml"))).await;
        mesh.write("service.yaml", service);
        mesh.until(|mesh| mesh.problems().is_empty()).await;
    }

    #[tokio::test]
    async fn directory_that_disappears_keeps_the_last_state() {
        let mesh = Followed::start(&[("a.yaml", &pod("a", "10.0.0.1"))]);
        let away = TempDir::new();
        fs::rename(mesh.dir.path(), away.path().join("x")).unwrap();
        mesh.until(|mesh| !mesh.problems().is_empty()).await;
        assert_eq!(mesh.pods().len(), 1);
        fs::rename(away.path().join("x"), mesh.dir.path()).unwrap();
        mesh.until(|mesh| mesh.problems().is_empty()).await;
        mesh.write("b.yaml", &pod("b", "10.0.0.2"));
        mesh.until_pods(&["a", "b"]).await;
    }

    #[tokio::test]
    async fn directory_that_is_not_there_at_the_start_is_an_error() {
        let dir = TempDir::new();
        let error = FileSource::open(&dir.path().join("absent"), settings()).unwrap_err();
        assert_eq!(error.reason(), "watch");
    }

    #[tokio::test]
    async fn file_that_is_too_large_or_no_text_is_reported() {
        let dir = TempDir::new();
        fs::File::create(dir.path().join("big.yaml")).unwrap().set_len(MAX_BYTES + 1).unwrap();
        fs::write(dir.path().join("bytes.yaml"), [0x80, 0x81]).unwrap();
        fs::create_dir(dir.path().join("sub.yaml")).unwrap();
        let (source, _) = FileSource::open(dir.path(), settings()).unwrap();
        let problems = Arc::clone(&source.problems().borrow());
        let at: Vec<_> = problems.iter().map(|problem| problem.at.as_str()).collect();
        assert_eq!(at, ["big.yaml", "bytes.yaml"]);
    }
}
