//! What is wrong with objects, for those who wrote them.
//!
//! # Guarantees
//!
//! - *Bounded where it is found.* Of one object [`MOST_OF_ONE`] problems are told, and [`MOST_PROBLEMS`] in all;
//!   the others are counted, and not even written out.
//! - *Fair.* Namespaces share what is told: what one tenant has wrong hides nothing of another's.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

use super::objects::{Kind, ObjectKey};

/// Problems that are told of one object: an object with more has one mistake many times, or is to fill the memory
/// of every agent.
pub(super) const MOST_OF_ONE: usize = 16;
/// Problems that are told in all.
pub(super) const MOST_PROBLEMS: usize = 1000;
/// Problems that are kept until it is known how many each namespace may have told: from then on no namespace adds to
/// more than [`MOST_OF_ONE`] of its own.
const MOST_KEPT: usize = 10 * MOST_PROBLEMS;

const CORRECT_THOSE: &str = "correct those that are told, and others are told in their place";

/// Something in a manifest that does not mean what its author wanted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Where it was read: file and document. Empty if the source has no files.
    pub at: String,
    /// `Pod default/web`; empty if the text did not get as far as being an object.
    pub object: String,
    /// The path of the field, as `kubectl explain` writes it.
    pub field: String,
    /// What is wrong, and what holds instead.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in [&self.at, &self.object, &self.field] {
            if !part.is_empty() {
                write!(f, "{part}: ")?;
            }
        }
        write!(f, "{}; {}", self.message, self.remedy)
    }
}

/// The problems of a set of objects, as they are found.
#[derive(Debug, Default)]
pub(super) struct Problems {
    by_namespace: BTreeMap<String, Found>,
    kept: usize,
}

/// What was found in one namespace.
#[derive(Debug, Default)]
struct Found {
    /// No more than are told in all: further ones could not be.
    problems: Vec<Problem>,
    more: usize,
}

impl Problems {
    /// Where what stands for so `many` problems of a namespace goes; `None` if they are only counted.
    fn room(&mut self, namespace: &str, many: usize) -> Option<&mut Vec<Problem>> {
        let most = if self.kept < MOST_KEPT { MOST_PROBLEMS } else { MOST_OF_ONE };
        let found = self.by_namespace.entry(namespace.to_owned()).or_default();
        if found.problems.len() >= most {
            found.more += many;
            return None;
        }
        self.kept += 1;
        Some(&mut found.problems)
    }

    /// Those that are told, in order, and how many more there are.
    pub(super) fn told(self) -> Vec<Problem> {
        let most = share(self.by_namespace.values().map(|found| found.problems.len()));
        let mut more = 0;
        let mut told = Vec::new();
        for Found { mut problems, more: others } in self.by_namespace.into_values() {
            problems.sort();
            more += others + problems.len().saturating_sub(most);
            problems.truncate(most);
            told.append(&mut problems);
        }
        told.sort();
        // Of more namespaces than there are places some are not heard at all.
        more += told.len().saturating_sub(MOST_PROBLEMS);
        told.truncate(MOST_PROBLEMS);
        if more > 0 {
            told.push(Problem {
                at: String::new(),
                object: String::new(),
                field: String::new(),
                message: format!("and {more} more, of any objects"),
                remedy: CORRECT_THOSE.into(),
            });
        }
        told
    }
}

/// How many of each namespace are told, so that all of them are no more than [`MOST_PROBLEMS`]: those that have
/// fewer leave their places to the others.
fn share(counts: impl Iterator<Item = usize>) -> usize {
    let mut counts: Vec<usize> = counts.collect();
    counts.sort_unstable();
    let (mut places, mut namespaces) = (MOST_PROBLEMS, counts.len());
    for count in counts {
        let each = places / namespaces;
        if count > each {
            return each.max(1);
        }
        places -= count;
        namespaces -= 1;
    }
    MOST_PROBLEMS
}

/// Collects the problems of one object: the first few of them, and how many more there are.
#[derive(Debug)]
pub(super) struct Report<'a> {
    object: &'a ObjectKey,
    problems: &'a mut Problems,
    said: usize,
}

impl<'a> Report<'a> {
    pub(super) fn of(object: &'a ObjectKey, problems: &'a mut Problems) -> Self {
        Self { object, problems, said: 0 }
    }

    /// Says what is wrong with a field, and what to do about it. What is not told is not written out: pass
    /// `format_args!`, and no text, where an object can have many.
    pub(super) fn say(
        &mut self,
        field: impl fmt::Display,
        message: impl fmt::Display,
        remedy: impl fmt::Display,
    ) {
        self.said += 1;
        if self.said <= MOST_OF_ONE {
            self.tell(1, &field, &message, &remedy);
        }
    }

    /// `many` is for how many problems it stands.
    fn tell(
        &mut self,
        many: usize,
        field: &dyn fmt::Display,
        message: &dyn fmt::Display,
        remedy: &dyn fmt::Display,
    ) {
        // Who may edit a Namespace is who has it.
        let namespace = match self.object.kind {
            Kind::Namespace => &self.object.name,
            _ => &self.object.namespace,
        };
        let Some(room) = self.problems.room(namespace, many) else { return };
        room.push(Problem {
            at: String::new(),
            object: self.object.to_string(),
            field: field.to_string(),
            message: message.to_string(),
            remedy: remedy.to_string(),
        });
    }
}

impl Drop for Report<'_> {
    fn drop(&mut self) {
        let more = self.said.saturating_sub(MOST_OF_ONE);
        if more > 0 {
            // The field comes behind the others in every order.
            self.tell(more, &"…", &format_args!("and {more} more"), &CORRECT_THOSE);
        }
    }
}

/// At most the first 64 characters of a text: what an annotation says may be 256 KiB long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shown<'a>(&'a str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().take(64).try_for_each(|one| f.write_char(one))
    }
}

/// At most the first 64 characters.
pub(super) fn shown(text: &str) -> Shown<'_> {
    Shown(text)
}

/// At most the first 300 characters: a parser may quote what it read.
pub(super) fn shown_long(text: &str) -> String {
    text.chars().take(300).collect()
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn service(namespace: &str, name: &str) -> ObjectKey {
        ObjectKey { kind: Kind::Service, namespace: namespace.into(), name: name.into() }
    }

    /// One problem of each of so many objects of a namespace.
    fn found(problems: &mut Problems, namespace: &str, objects: usize) {
        for n in 0..objects {
            Report::of(&service(namespace, &format!("s{n:05}")), problems).say("spec", "no", "yes");
        }
    }

    fn told_of(told: &[Problem], namespace: &str) -> usize {
        let prefix = format!("Service {namespace}/");
        told.iter().filter(|problem| problem.object.starts_with(&prefix)).count()
    }

    #[test]
    fn namespace_with_thousands_of_problems_hides_none_of_another() {
        let mut problems = Problems::default();
        found(&mut problems, "many", 3 * MOST_PROBLEMS);
        found(&mut problems, "none-but", 2);
        found(&mut problems, "some", 3 * MOST_PROBLEMS);
        let told = problems.told();
        assert_eq!(told_of(&told, "none-but"), 2);
        assert_eq!((told_of(&told, "many"), told_of(&told, "some")), (499, 499));
        let last = told.last().unwrap();
        assert_eq!(last.message, "and 5002 more, of any objects");
        assert_eq!(told.len(), MOST_PROBLEMS + 1);
        assert!(told[..MOST_PROBLEMS].is_sorted());
    }

    #[test]
    fn namespace_may_have_all_that_others_leave() {
        let mut problems = Problems::default();
        found(&mut problems, "many", MOST_PROBLEMS - 1);
        found(&mut problems, "one", 1);
        let told = problems.told();
        assert_eq!(told.len(), MOST_PROBLEMS);
        assert_eq!((told_of(&told, "many"), told_of(&told, "one")), (MOST_PROBLEMS - 1, 1));
    }

    #[test]
    fn more_namespaces_than_places_are_bounded_too() {
        let mut problems = Problems::default();
        for n in 0..2 * MOST_PROBLEMS {
            found(&mut problems, &format!("n{n:05}"), 1);
        }
        let told = problems.told();
        assert_eq!(told.len(), MOST_PROBLEMS + 1);
        assert_eq!(told[MOST_PROBLEMS].message, "and 1000 more, of any objects");
    }

    #[test]
    fn what_is_kept_meanwhile_is_bounded_however_many_namespaces_there_are() {
        let mut problems = Problems::default();
        let namespaces = 30;
        for n in 0..namespaces {
            found(&mut problems, &format!("n{n:02}"), MOST_PROBLEMS);
        }
        assert!(problems.kept <= MOST_KEPT + namespaces * MOST_OF_ONE, "{}", problems.kept);
        let told = problems.told();
        assert!((0..namespaces).all(|n| told_of(&told, &format!("n{n:02}")) >= MOST_OF_ONE));
        let more = namespaces * MOST_PROBLEMS - (told.len() - 1);
        assert_eq!(told.last().unwrap().message, format!("and {more} more, of any objects"));
    }

    /// Who may edit a Namespace is who has it: a tenant with many must not hide those of others.
    #[test]
    fn what_is_wrong_with_a_namespace_counts_as_its_own() {
        let mut problems = Problems::default();
        let names: Vec<_> = (0..100).map(|n| format!("n{n:03}")).collect();
        for name in &names {
            let key =
                ObjectKey { kind: Kind::Namespace, namespace: String::new(), name: name.clone() };
            let mut report = Report::of(&key, &mut problems);
            for field in 0..MOST_OF_ONE {
                report.say(field, "no", "yes");
            }
        }
        found(&mut problems, "many", 3 * MOST_PROBLEMS);
        let told = problems.told();
        for name in names {
            let object = format!("Namespace {name}");
            assert!(told.iter().any(|problem| problem.object == object), "{name}");
        }
        assert!(told_of(&told, "many") > 0);
    }

    #[test]
    fn problems_that_are_only_counted_are_counted_each() {
        let mut problems = Problems::default();
        found(&mut problems, "many", MOST_PROBLEMS);
        let last = service("many", "s99999");
        let mut report = Report::of(&last, &mut problems);
        for field in 0..2 * MOST_OF_ONE {
            report.say(field, "no", "yes");
        }
        drop(report);
        let told = problems.told();
        assert_eq!(told_of(&told, "many"), MOST_PROBLEMS);
        let more = 2 * MOST_OF_ONE;
        assert_eq!(told.last().unwrap().message, format!("and {more} more, of any objects"));
    }

    /// Counts how often it is written out.
    struct Counted<'a>(&'a Cell<usize>);

    impl fmt::Display for Counted<'_> {
        fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
            self.0.set(self.0.get() + 1);
            Ok(())
        }
    }

    #[test]
    fn what_is_not_told_is_not_written_out() {
        let (written, mut problems) = (Cell::new(0), Problems::default());
        let one = service("many", "one");
        let mut report = Report::of(&one, &mut problems);
        for _ in 0..30_000 {
            report.say(Counted(&written), "no", "yes");
        }
        drop(report);
        assert_eq!(written.get(), MOST_OF_ONE);
        for _ in 0..2 * MOST_PROBLEMS {
            Report::of(&one, &mut problems).say(Counted(&written), "no", "yes");
        }
        // One says how many more there are of the first.
        assert_eq!(written.get(), MOST_PROBLEMS - 1);
    }

    #[test]
    fn long_text_is_shown_in_part() {
        assert_eq!(shown(&"ä".repeat(100)).to_string(), "ä".repeat(64));
        assert_eq!(shown("short").to_string(), "short");
    }
}
