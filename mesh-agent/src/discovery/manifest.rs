//! Manifests: YAML or JSON text into typed Kubernetes objects.
//!
//! A file holds any number of documents, and a document one object or a `kind: List`. Kinds that are
//! not understood are named and left out; anything else that is wrong is an error that says document,
//! line, field and remedy.
//!
//! Bounded: a text by [`MAX_BYTES`], nesting and aliases by the parser's budget, so that no file can
//! make the agent grow far beyond its own size.

use std::sync::Arc;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::Problem;
use super::objects::{Kind, Object};

/// The largest manifest. A cluster of 5,000 pods in one file is about 12 MiB.
pub const MAX_BYTES: u64 = 16 << 20;

/// How [`Manifest::ignored`] names the objects by which Kubernetes says who may talk to whom.
const NETWORK_POLICY: &str = "networking.k8s.io/v1 NetworkPolicy";

/// Reads `$read` as the type of `$kind`: the expression takes its type from each arm.
macro_rules! typed {
    ($kind:expr, $read:expr) => {
        match $kind {
            Kind::Namespace => Object::Namespace(Arc::new($read)),
            Kind::Node => Object::Node(Arc::new($read)),
            Kind::Pod => Object::Pod(Arc::new($read)),
            Kind::ServiceAccount => Object::ServiceAccount(Arc::new($read)),
            Kind::Service => Object::Service(Arc::new($read)),
            Kind::EndpointSlice => Object::EndpointSlice(Arc::new($read)),
        }
    };
}

/// How a text is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `*.yaml`, `*.yml`.
    Yaml,
    /// `*.json`.
    Json,
}

/// What a text holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Manifest {
    /// The objects that are understood, each with the number of its document, counted from 1.
    pub objects: Vec<(usize, Object)>,
    /// `<apiVersion> <kind>` of those that are not.
    pub ignored: Vec<String>,
}

impl Manifest {
    /// How many NetworkPolicies it holds. Nothing here enforces them: the CNI does, where it can.
    pub fn network_policies(&self) -> usize {
        self.ignored.iter().filter(|kind| *kind == NETWORK_POLICY).count()
    }
}

/// Parses `text`.
///
/// # Errors
///
/// The first thing that is wrong, as a [`Problem`] whose `at` is the place in the text.
pub fn parse(text: &str, format: Format) -> Result<Manifest, Problem> {
    let mut manifest = Manifest::default();
    let documents = match format {
        Format::Yaml => documents(text),
        Format::Json => vec![Document { number: 1, first_line: 1, text, format }],
    };
    for document in documents {
        let Some(header) = document.read::<Option<Header>>()? else { continue };
        let Some(items) = header.items.as_ref().filter(|_| header.kind == "List") else {
            match Kind::of(&header.api_version, &header.kind) {
                Some(kind) => {
                    let object = typed!(kind, document.read()?);
                    manifest.objects.push((document.number, named(&document, "", object)?));
                }
                None => manifest.ignored.push(header.to_string()),
            }
            continue;
        };
        for (index, item) in items.iter().enumerate() {
            let path = format!("items[{index}]");
            let header: Header = in_list(&document, &path, item)?;
            match Kind::of(&header.api_version, &header.kind) {
                Some(kind) => {
                    let object = typed!(kind, in_list(&document, &path, item)?);
                    manifest.objects.push((document.number, named(&document, &path, object)?));
                }
                None => manifest.ignored.push(header.to_string()),
            }
        }
    }
    Ok(manifest)
}

/// What every object begins with, and what a list holds.
#[derive(Debug, Deserialize)]
struct Header {
    #[serde(rename = "apiVersion")]
    api_version: String,
    kind: String,
    items: Option<Vec<Value>>,
}

impl std::fmt::Display for Header {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", super::shown(&self.api_version), super::shown(&self.kind))
    }
}

/// One document of a text.
#[derive(Clone, Copy, Debug)]
struct Document<'a> {
    /// Counted from 1, empty ones too, as an editor's search for `---` finds them.
    number: usize,
    /// The line of the text that its first line is.
    first_line: usize,
    text: &'a str,
    format: Format,
}

/// Splits at lines that begin with `---`: YAML 1.2.2 section 9.1.2 allows such a line nowhere else,
/// not even inside a scalar. Each document is then parsed alone, under a budget of its own.
fn documents(text: &str) -> Vec<Document<'_>> {
    let is_marker = |line: &str| {
        line.strip_prefix("---")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
    };
    let mut found = Vec::new();
    let (mut begin, mut first_line, mut at) = (0, 1, 0);
    let mut holds_text = false;
    for (index, line) in text.split_inclusive('\n').enumerate() {
        // A marker before any content opens the first document and ends none.
        if is_marker(line) && (holds_text || !found.is_empty()) {
            found.push((begin, at, first_line));
            (begin, first_line) = (at, index + 1);
        }
        let content = line.trim();
        holds_text |= !content.is_empty() && !content.starts_with(['#', '%']);
        at += line.len();
    }
    found.push((begin, text.len(), first_line));
    let numbered = found.into_iter().enumerate();
    numbered
        .filter_map(|(index, (begin, end, first_line))| {
            let text = text.get(begin..end)?;
            Some(Document { number: index + 1, first_line, text, format: Format::Yaml })
        })
        .collect()
}

impl Document<'_> {
    fn read<T: DeserializeOwned>(&self) -> Result<T, Problem> {
        match self.format {
            Format::Yaml => self.read_yaml(),
            Format::Json => {
                let mut json = serde_json::Deserializer::from_str(self.text);
                let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
                    let line = error.inner().line();
                    self.problem(Some(line), path_of(error.path()), json_message(error.inner()))
                })?;
                json.end().map_err(|error| {
                    self.problem(Some(error.line()), String::new(), json_message(&error))
                })?;
                Ok(value)
            }
        }
    }

    fn read_yaml<T: DeserializeOwned>(&self) -> Result<T, Problem> {
        // The parser counts what it makes, not what it reads: each limit is what 16 MiB of plain text
        // can hold, and aliases may add little to that.
        let options = serde_saphyr::options! {
            budget: serde_saphyr::budget! {
                max_events: 16_000_000,
                max_nodes: 8_000_000,
                max_documents: 1,
                max_aliases: 10_000,
            },
            alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 100_000 },
            with_snippet: false,
        };
        let mut field = String::new();
        serde_saphyr::with_deserializer_from_str_with_options(self.text, options, |yaml| {
            serde_path_to_error::deserialize(yaml).map_err(|error| {
                field = path_of(error.path());
                error.into_inner()
            })
        })
        .map_err(|error| {
            let error = error.without_snippet();
            let line = error.location().map(|at| usize::try_from(at.line()).unwrap_or(0));
            self.problem(line, field.clone(), super::shown_long(&error.to_string()))
        })
    }

    /// A problem at `line` of this document, counted from 1.
    fn problem(&self, line: Option<usize>, field: String, message: String) -> Problem {
        let mut at = format!("document {}", self.number);
        if let Some(line) = line.filter(|line| *line > 0) {
            at = format!("{at}, line {}", self.first_line + line - 1);
        }
        let remedy = "correct it; until then the file's last good objects stay in force".into();
        Problem { at, object: String::new(), field, message, remedy }
    }
}

/// Reads a part of a document that is in memory already.
fn in_list<T: DeserializeOwned>(
    document: &Document<'_>,
    path: &str,
    item: &Value,
) -> Result<T, Problem> {
    serde_path_to_error::deserialize(item).map_err(|error| {
        let field = match path_of(error.path()) {
            inner if inner.is_empty() => path.to_owned(),
            inner => format!("{path}.{inner}"),
        };
        document.problem(None, field, super::shown_long(&error.inner().to_string()))
    })
}

/// An object without a name could never be told from another.
fn named(document: &Document<'_>, path: &str, object: Object) -> Result<Object, Problem> {
    if object.key().name.is_empty() {
        let field = match path {
            "" => "metadata.name".into(),
            path => format!("{path}.metadata.name"),
        };
        return Err(document.problem(None, field, "the object has no name".into()));
    }
    Ok(object)
}

fn path_of(path: &serde_path_to_error::Path) -> String {
    match path.to_string() {
        root if root == "." => String::new(),
        path => path,
    }
}

/// serde_json appends a line and column to its message; the line stands in `at` already.
fn json_message(error: &serde_json::Error) -> String {
    let text = error.to_string();
    super::shown_long(text.rsplit_once(" at line ").map_or(text.as_str(), |(message, _)| message))
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop}\n";

    fn names(manifest: &Manifest) -> Vec<(usize, String)> {
        let named = |(number, object): &(usize, Object)| (*number, object.key().to_string());
        manifest.objects.iter().map(named).collect()
    }

    fn yaml(text: &str) -> Result<Manifest, Problem> {
        parse(text, Format::Yaml)
    }

    #[test]
    fn documents_are_numbered_as_they_stand() {
        let text =
            format!("# licence\n---\n{POD}---\n# nothing\n---\n{}", POD.replace("web", "db"));
        let manifest = yaml(&text).unwrap();
        assert_eq!(names(&manifest), [(1, "Pod shop/web".into()), (3, "Pod shop/db".into())]);
    }

    #[test]
    fn text_without_objects_is_valid() {
        for text in ["", "\n", "---\n", "# only this\n", "---\n---\n", "---\n...\n"] {
            assert_eq!(yaml(text).unwrap(), Manifest::default(), "{text:?}");
        }
    }

    #[test]
    fn network_policies_are_counted() {
        let policy = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: a}\n";
        let other = policy.replace("networking.k8s.io", "crd.projectcalico.org");
        let list = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: networking.k8s.io/v1, \
                    kind: NetworkPolicy, metadata: {name: b}}\n";
        let manifest = yaml(&format!("{POD}---\n{policy}---\n{other}---\n{list}")).unwrap();
        assert_eq!(manifest.network_policies(), 2);
        assert_eq!(yaml(POD).unwrap().network_policies(), 0);
    }

    #[test]
    fn marker_inside_a_line_does_not_split() {
        let text = format!("{POD}  \nspec:\n  nodeName: \"a --- b\"\n  hostname: x\n# --- no\n");
        assert_eq!(yaml(&text).unwrap().objects.len(), 1);
    }

    #[test]
    fn every_kind_is_read_and_others_are_named() {
        let kinds = [
            ("v1", "Namespace"),
            ("v1", "Node"),
            ("v1", "Pod"),
            ("v1", "ServiceAccount"),
            ("v1", "Service"),
            ("discovery.k8s.io/v1", "EndpointSlice"),
            ("apps/v1", "Deployment"),
            ("serving.knative.dev/v1", "Service"),
        ];
        let document = |(api, kind): &(&str, &str)| {
            format!(
                "---\napiVersion: {api}\nkind: {kind}\nmetadata: {{name: x}}\naddressType: IPv4\n"
            )
        };
        let text: String = kinds.iter().map(document).collect();
        let manifest = yaml(&text).unwrap();
        assert_eq!(manifest.objects.len(), 6);
        assert_eq!(manifest.ignored, ["apps/v1 Deployment", "serving.knative.dev/v1 Service"]);
    }

    #[test]
    fn list_is_its_items() {
        let text = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Pod, metadata: {name: a}}\n\
                    - {apiVersion: v1, kind: ConfigMap, metadata: {name: c}}\n\
                    - {apiVersion: v1, kind: Node, metadata: {name: b}}\n";
        let manifest = yaml(text).unwrap();
        assert_eq!(names(&manifest), [(1, "Pod default/a".into()), (1, "Node b".into())]);
        assert_eq!(manifest.ignored, ["v1 ConfigMap"]);
        let json = r#"{"apiVersion":"v1","kind":"List","items":[{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"}}]}"#;
        assert_eq!(parse(json, Format::Json).unwrap().objects.len(), 1);
    }

    #[test]
    fn error_names_document_line_and_field() {
        let text = format!("{POD}---\n{POD}spec:\n  hostNetwork: maybe\n");
        let problem = yaml(&text).unwrap_err();
        assert_eq!(problem.at, "document 2, line 9");
        assert_eq!(problem.field, "spec.hostNetwork");
        assert!(problem.message.contains("bool"), "{problem}");

        let json =
            "{\n\"apiVersion\": \"v1\",\n\"kind\": \"Pod\",\n\"spec\": {\"hostNetwork\": 3}}";
        let problem = parse(json, Format::Json).unwrap_err();
        assert_eq!(
            (problem.at.as_str(), problem.field.as_str()),
            ("document 1, line 4", "spec.hostNetwork")
        );
        assert!(!problem.message.contains("line"), "{problem}");
    }

    #[test]
    fn error_in_a_list_names_the_item() {
        let text = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Pod, metadata: {name: 3}}\n";
        assert_eq!(yaml(text).unwrap_err().field, "items[0].metadata.name");
        let text =
            "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Pod, metadata: {}}\n";
        assert_eq!(yaml(text).unwrap_err().field, "items[0].metadata.name");
    }

    #[test]
    fn what_is_no_object_is_an_error() {
        for text in
            ["- a\n", "a: b\n", "text", "kind: Pod\n", "a: [", "apiVersion: v1\nkind: Pod\n"]
        {
            let problem = yaml(text).unwrap_err();
            assert!(problem.at.starts_with("document 1"), "{text:?}: {problem}");
        }
        assert!(parse("{} {}", Format::Json).is_err());
        assert!(parse("", Format::Json).is_err());
    }

    #[test]
    fn key_given_twice_is_an_error() {
        assert!(yaml(&format!("{POD}metadata: {{name: other}}\n")).is_err());
    }

    /// A billion laughs: ten levels of ten aliases each.
    #[test]
    fn alias_bomb_is_refused() {
        let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..10 {
            let inner = vec![format!("*a{}", level - 1); 10].join(", ");
            text += &format!("a{level}: &a{level} [{inner}]\n");
        }
        let problem = yaml(&format!("{POD}{text}")).unwrap_err();
        assert!(problem.message.to_lowercase().contains("limit"), "{problem}");
    }

    /// More nodes than the parser allows by default: what `kubectl get pods -A -o yaml` prints.
    #[test]
    fn large_list_is_within_the_budget() {
        let pod = |number| {
            format!(
                "- apiVersion: v1\n  kind: Pod\n  metadata: {{name: p{number}, labels: {{a: b, c: d, e: f}}}}\n\
                 \x20 spec: {{nodeName: a, containers: [{{name: c, image: i}}]}}\n\
                 \x20 status: {{podIPs: [{{ip: 10.0.0.1}}]}}\n"
            )
        };
        let items: String = (0..9_000).map(pod).collect();
        let text = format!("apiVersion: v1\nkind: List\nitems:\n{items}");
        assert_eq!(yaml(&text).unwrap().objects.len(), 9_000);
    }

    #[test]
    fn nesting_bomb_is_refused() {
        let deep = format!("{POD}x: {}", "[".repeat(100_000));
        assert!(yaml(&deep).is_err());
        assert!(parse(&"[".repeat(100_000), Format::Json).is_err());
    }
}
