//! Who talked to whom: the access logs of the agents, summed up by pair of workloads.

use std::collections::BTreeMap;

use harness::Record;

use crate::text::{amount, bytes, table};

/// All connections between two workloads that went the same way.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Pair {
    source: Party,
    destination: Party,
    way: String,
    carrier: String,
}

/// One end, and who it proved to be.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Party {
    workload: String,
    identity: String,
}

/// What they exchanged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Totals {
    connections: u64,
    failed: u64,
    sent: u64,
    received: u64,
}

/// The sum of the records.
#[derive(Debug, Default)]
pub(crate) struct Story(BTreeMap<Pair, Totals>);

impl Story {
    /// Adds a record, if it is the client's agent's: every connection is told by both.
    pub(crate) fn add(&mut self, record: &Record) {
        if record.text("direction") != "outbound" {
            return;
        }
        let or_dash = |key| Some(record.text(key)).filter(|text| !text.is_empty()).unwrap_or("-");
        let party = |workload, identity| Party {
            workload: or_dash(workload).to_owned(),
            identity: or_dash(identity).to_owned(),
        };
        let pair = Pair {
            source: party("src.workload", "src.identity"),
            destination: party("dst.workload", "dst.identity"),
            way: or_dash("way").to_owned(),
            carrier: or_dash("carrier").to_owned(),
        };
        let totals = self.0.entry(pair).or_default();
        totals.connections += 1;
        totals.failed += u64::from(record.text("message") == "connection failed");
        totals.sent += record.number("bytes_sent");
        totals.received += record.number("bytes_recv");
    }

    /// Connections between workloads whose agents proved both identities to each other, over a wire.
    pub(crate) fn tunnelled(&self) -> u64 {
        let proven = |party: &Party| party.identity.starts_with("spiffe://");
        self.0
            .iter()
            .filter(|(pair, _)| {
                pair.way == "tunnel" && proven(&pair.source) && proven(&pair.destination)
            })
            .map(|(_, totals)| totals.connections - totals.failed)
            .sum()
    }

    /// All connections, and those that failed.
    pub(crate) fn connections(&self) -> (u64, u64) {
        self.0.values().fold((0, 0), |(all, failed), totals| {
            (all + totals.connections, failed + totals.failed)
        })
    }

    /// The table of who talked to whom.
    pub(crate) fn traffic(&self) -> String {
        let rows = self.0.iter().map(|(pair, totals)| {
            vec![
                pair.source.workload.clone(),
                pair.destination.workload.clone(),
                pair.way.clone(),
                pair.carrier.clone(),
                amount(totals.connections),
                amount(totals.failed),
                bytes(totals.sent),
                bytes(totals.received),
            ]
        });
        let head =
            ["FROM", "TO", "WAY", "CARRIER", ">CONNECTIONS", ">FAILED", ">SENT", ">RECEIVED"];
        table(&head, rows)
    }

    /// The table of who each workload proved to be.
    pub(crate) fn identities(&self) -> String {
        let mut parties: Vec<_> =
            self.0.keys().flat_map(|pair| [&pair.source, &pair.destination]).collect();
        parties.sort_unstable();
        parties.dedup();
        let rows = parties.iter().map(|party| vec![party.workload.clone(), party.identity.clone()]);
        table(&["WORKLOAD", "IDENTITY (SPIFFE ID of its certificate)"], rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(changes: &[(&str, &str)]) -> Record {
        let mut record = serde_json::json!({
            "scope": "access",
            "direction": "outbound",
            "src.workload": "productpage-v1",
            "src.identity": "spiffe://cluster.local/ns/bookinfo/sa/bookinfo-productpage",
            "dst.workload": "details-v1",
            "dst.identity": "spiffe://cluster.local/ns/bookinfo/sa/bookinfo-details",
            "way": "tunnel",
            "carrier": "lane",
            "bytes_sent": 100,
            "bytes_recv": 2000,
        });
        for (key, value) in changes {
            record[*key] = serde_json::Value::from(*value);
        }
        Record::parse(&record.to_string()).unwrap()
    }

    #[test]
    fn a_pairs_connections_are_summed_up_from_the_clients_side_only() {
        let mut story = Story::default();
        story.add(&record(&[]));
        story.add(&record(&[("message", "connection failed"), ("reason", "timeout")]));
        story.add(&record(&[("direction", "inbound")]));
        let text = story.traffic();
        let row: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(
            row,
            ["productpage-v1", "details-v1", "tunnel", "lane", "2", "1", "200", "B", "3.9", "KiB"]
        );
        assert_eq!(text.lines().count(), 2, "{text}");
        assert_eq!(story.connections(), (2, 1));
    }

    #[test]
    fn only_proven_identities_over_a_wire_count_as_tunnelled() {
        let mut story = Story::default();
        story.add(&record(&[]));
        story.add(&record(&[("way", "local")]));
        story.add(&record(&[("dst.identity", "")]));
        story.add(&record(&[("message", "connection failed")]));
        assert_eq!(story.tunnelled(), 1);
    }

    #[test]
    fn each_workload_is_named_once_with_its_identity() {
        let mut story = Story::default();
        story.add(&record(&[]));
        story.add(&record(&[("dst.workload", "reviews-v1"), ("dst.identity", "")]));
        let text = story.identities();
        assert_eq!(text.lines().count(), 4, "{text}");
        assert!(text.contains("spiffe://cluster.local/ns/bookinfo/sa/bookinfo-details"), "{text}");
    }
}
