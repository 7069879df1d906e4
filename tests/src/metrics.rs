//! What `/metrics` says, read back.

use std::collections::BTreeMap;

/// One scrape.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    series: Vec<Series>,
}

#[derive(Clone, Debug)]
struct Series {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Metrics {
    /// Reads the text format of Prometheus and OpenMetrics. Lines that are neither a series nor a
    /// comment are left out.
    pub fn parse(text: &str) -> Self {
        Self { series: text.lines().filter_map(series).collect() }
    }

    /// The sum of all series of the family `name` that carry these labels.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.matching(name, labels).map(|series| series.value).sum()
    }

    /// How many series of the family `name` carry these labels.
    pub fn count(&self, name: &str, labels: &[(&str, &str)]) -> usize {
        self.matching(name, labels).count()
    }

    /// The values of the label `label` in the family `name`.
    pub fn values(&self, name: &str, label: &str) -> Vec<&str> {
        let family = self.series.iter().filter(|series| series.name == name);
        family.filter_map(|series| series.labels.get(label)).map(String::as_str).collect()
    }

    /// Every label of the first series of the family `name`.
    pub fn labels(&self, name: &str) -> Vec<&str> {
        let series = self.series.iter().find(|series| series.name == name);
        series.map(|series| series.labels.keys().map(String::as_str).collect()).unwrap_or_default()
    }

    fn matching<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&str, &str)],
    ) -> impl Iterator<Item = &'a Series> {
        self.series.iter().filter(move |series| {
            series.name == name
                && labels
                    .iter()
                    .all(|(key, value)| series.labels.get(*key).is_some_and(|found| found == value))
        })
    }
}

fn series(line: &str) -> Option<Series> {
    if line.starts_with('#') || line.is_empty() {
        return None;
    }
    let (name, labels, rest) = match line.split_once('{') {
        Some((name, rest)) => {
            let (labels, rest) = labels(rest)?;
            (name, labels, rest)
        }
        None => {
            let (name, rest) = line.split_once(' ')?;
            (name, BTreeMap::new(), rest)
        }
    };
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some(Series { name: name.to_owned(), labels, value })
}

/// `key="value",…}` and what follows.
fn labels(text: &str) -> Option<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches(',');
        if let Some(after) = rest.strip_prefix('}') {
            return Some((labels, after));
        }
        let (key, after) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut chars = after.char_indices();
        let end = loop {
            match chars.next()? {
                (at, '"') => break at + 1,
                (_, '\\') => match chars.next()?.1 {
                    'n' => value.push('\n'),
                    escaped => value.push(escaped),
                },
                (_, plain) => value.push(plain),
            }
        };
        labels.insert(key.to_owned(), value);
        rest = &after[end..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scrape_is_read_back() {
        let metrics = Metrics::parse(
            "# TYPE sent counter\nsent_total{reporter=\"source\",app=\"a\\\"},{b\"} 3\n\
             sent_total{reporter=\"destination\",app=\"x\"} 4 1700000000\nup 1\nnot a series\n# EOF\n",
        );
        assert_eq!(metrics.sum("sent_total", &[]), 7.0);
        assert_eq!(metrics.sum("sent_total", &[("reporter", "source")]), 3.0);
        assert_eq!(metrics.sum("sent_total", &[("app", "a\"},{b")]), 3.0);
        assert_eq!(metrics.count("sent_total", &[("reporter", "nobody")]), 0);
        assert_eq!(metrics.values("sent_total", "reporter"), ["source", "destination"]);
        assert_eq!(metrics.labels("sent_total"), ["app", "reporter"]);
        assert_eq!(metrics.sum("up", &[]), 1.0);
    }
}
