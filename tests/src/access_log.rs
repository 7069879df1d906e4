//! One record of an agent's access log.

use serde_json::Value;

/// What the agent wrote when a connection had ended.
#[derive(Clone, Debug)]
pub struct Record(Value);

impl Record {
    /// A line of an agent's output, if it is a record in JSON.
    pub fn parse(line: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(line).ok()?;
        (value["scope"] == "access").then_some(Self(value))
    }

    /// The text of a key such as `src.identity`; empty where the record has none.
    pub fn text(&self, key: &str) -> &str {
        self.0[key].as_str().unwrap_or_default()
    }

    /// The number of a key such as `bytes_sent`; 0 where the record has none.
    pub fn number(&self, key: &str) -> u64 {
        self.0[key].as_u64().unwrap_or_default()
    }

    /// Whether the record has these texts.
    pub fn has(&self, texts: &[(&str, &str)]) -> bool {
        texts.iter().all(|(key, value)| self.text(key) == *value)
    }
}
