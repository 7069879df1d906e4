//! What is known of a directory of manifests, file by file, and the snapshot that follows from it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mesh_core::snapshot::Snapshot;
use tracing::{error, info, warn};

use super::file::Settings;
use super::manifest::{self, Format, MAX_BYTES, Manifest};
use super::objects::{Object, Objects};
use super::translate::{Context, NetnsFrom, translate};
use super::{Problem, shown};

/// How many NetworkPolicies the manifests in `dir` hold; a file that cannot be read has none.
///
/// # Errors
///
/// The directory cannot be listed.
pub fn network_policies(dir: &Path) -> io::Result<usize> {
    let in_file = |name: String| {
        let text = read_bounded(&dir.join(&name)).ok()?;
        let manifest = manifest::parse(str::from_utf8(&text).ok()?, format_of(&name)).ok()?;
        Some(manifest.network_policies())
    };
    Ok(manifests(dir)?.into_iter().filter_map(in_file).sum())
}

/// What is known of the directory.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    context: Context,
    files: BTreeMap<String, File>,
    /// Kinds that were named in the log already.
    ignored: BTreeSet<String>,
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) problems: Vec<Problem>,
    gone: bool,
}

/// What is known of one file.
#[derive(Debug, Default)]
struct File {
    /// Of the content last looked at; `None` if it could not be read.
    hash: Option<u64>,
    /// The objects of its last good content, with the numbers of their documents.
    objects: Vec<(usize, Object)>,
    network_policies: usize,
    problem: Option<Problem>,
}

impl Directory {
    pub(super) fn new(path: &Path, settings: Settings) -> Self {
        let Settings { node, trust_domain, tunnel_port } = settings;
        Self {
            path: path.into(),
            files: BTreeMap::new(),
            ignored: BTreeSet::new(),
            snapshot: Arc::new(Snapshot::empty(Arc::clone(&node), trust_domain.clone())),
            problems: Vec::new(),
            gone: false,
            context: Context {
                node,
                trust_domain,
                tunnel_port,
                netns: NetnsFrom::Annotation,
                pod_cidrs: Vec::new(),
            },
        }
    }

    /// Brings everything up to what the files say now.
    pub(super) fn read(&mut self) -> io::Result<()> {
        let names = manifests(&self.path)?;
        let before = self.files.len();
        self.files.retain(|name, _| names.contains(name));
        let mut changed = before != self.files.len() || self.snapshot.generation == 0;
        for name in names {
            changed |= self.read_file(name);
        }
        if changed {
            self.translate();
        }
        Ok(())
    }

    /// Whether the file is new or says something else than before.
    fn read_file(&mut self, name: String) -> bool {
        let path = self.path.join(&name);
        let format = format_of(&name);
        let read = read_bounded(&path);
        let hash = read.as_ref().ok().map(|text| {
            let mut hasher = DefaultHasher::new();
            text.hash(&mut hasher);
            hasher.finish()
        });
        let known = self.files.get(&name);
        if hash.is_some() && known.is_some_and(|file| file.hash == hash) {
            return false;
        }
        let parsed = match read {
            Ok(text) => match String::from_utf8(text) {
                Ok(text) => manifest::parse(&text, format),
                Err(error) => {
                    let at = error.utf8_error().valid_up_to();
                    Err(unreadable(format!("byte {at} is not UTF-8"), "save it as UTF-8"))
                }
            },
            Err(error) => Err(unreadable(error.to_string(), "make it readable, and no larger")),
        };
        let file = self.files.entry(name.clone()).or_default();
        file.hash = hash;
        match parsed {
            Ok(manifest) => {
                file.network_policies = manifest.network_policies();
                let Manifest { objects, ignored } = manifest;
                file.objects = objects;
                file.problem = None;
                for kind in ignored {
                    if self.ignored.insert(kind.clone()) {
                        info!(kind, file = name, "kind is not used and left out");
                    }
                }
                true
            }
            Err(mut problem) => {
                problem.at = match problem.at.as_str() {
                    "" => name,
                    place => format!("{name}, {place}"),
                };
                let changed = file.problem.as_ref() != Some(&problem);
                file.problem = Some(problem);
                changed
            }
        }
    }

    /// How many NetworkPolicies all files hold.
    pub(super) fn network_policies(&self) -> usize {
        self.files.values().map(|file| file.network_policies).sum()
    }

    /// Makes a snapshot of what all files say, and takes it if it is another.
    fn translate(&mut self) {
        let mut objects = Objects::default();
        let mut places = HashMap::new();
        let mut problems: Vec<_> =
            self.files.values().filter_map(|file| file.problem.clone()).collect();
        for (name, file) in &self.files {
            if file.problem.is_some() {
                objects.add_unread(shown(name).to_string());
            }
            for (document, object) in &file.objects {
                let at = format!("{}, document {document}", shown(name));
                let key = object.key();
                if objects.contains(&key) {
                    let first = places.get(&key.to_string()).cloned().unwrap_or_default();
                    problems.push(Problem {
                        at,
                        object: key.to_string(),
                        field: "metadata.name".into(),
                        message: format!("the same object is in {first}, which counts"),
                        remedy: "remove one of them".into(),
                    });
                    continue;
                }
                places.insert(key.to_string(), at);
                objects.insert(object.clone());
            }
        }
        let generation = self.snapshot.generation + 1;
        let (snapshot, found) = translate(&objects, &self.context, generation);
        problems.extend(found.into_iter().map(|problem| Problem {
            at: places.get(&problem.object).cloned().unwrap_or_default(),
            ..problem
        }));
        problems.sort();
        self.take_problems(problems);
        if generation == 1 || !snapshot.same_state(&self.snapshot) {
            super::tell_of(&snapshot);
            self.snapshot = Arc::new(snapshot);
        }
    }

    /// Remembers and logs, once, that the directory went or came back.
    pub(super) fn note(&mut self, result: &io::Result<()>) {
        match result {
            Ok(()) if self.gone => {
                info!(path = %self.path.display(), "manifests are back");
                self.gone = false;
                self.translate();
            }
            Err(error) if !self.gone => {
                self.gone = true;
                error!(path = %self.path.display(), %error, "manifests are gone, the last state stays");
                self.problems.push(Problem {
                    at: self.path.display().to_string(),
                    object: String::new(),
                    field: String::new(),
                    message: format!("{error}; the last state stays in force"),
                    remedy: "put the directory back".into(),
                });
            }
            _ => {}
        }
    }

    fn take_problems(&mut self, problems: Vec<Problem>) {
        for problem in problems.iter().filter(|problem| !self.problems.contains(problem)) {
            warn!(
                at = problem.at,
                object = problem.object,
                field = problem.field,
                remedy = problem.remedy,
                "{}",
                problem.message
            );
        }
        for problem in self.problems.iter().filter(|problem| !problems.contains(problem)) {
            info!(
                at = problem.at,
                object = problem.object,
                field = problem.field,
                "problem is gone"
            );
        }
        self.problems = problems;
    }
}

fn format_of(name: &str) -> Format {
    if name.ends_with(".json") { Format::Json } else { Format::Yaml }
}

/// The names of the manifests in a directory.
fn manifests(dir: &Path) -> io::Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let suffix = name.rsplit_once('.').map(|(_, suffix)| suffix);
        let ours = !name.starts_with('.') && matches!(suffix, Some("yaml" | "yml" | "json"));
        // Through links, and no pipe: opening one would wait for its writer.
        if ours && fs::metadata(entry.path()).is_ok_and(|meta| meta.is_file()) {
            names.insert(name);
        }
    }
    Ok(names)
}

/// The limit holds also for a file that grows while it is read.
fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    fs::File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(io::Error::other(format!("larger than {MAX_BYTES} bytes")));
    }
    Ok(text)
}

fn unreadable(message: String, remedy: &str) -> Problem {
    let (at, object, field) = Default::default();
    let remedy = format!("{remedy}; until then its last good objects stay in force");
    Problem { at, object, field, message, remedy }
}
