//! Where a new connection's time goes on its way through the agents: what each stage took, as the
//! agents' own histograms have it.

use anyhow::Result;
use harness::Agent;

const HISTOGRAM: &str = "mesh_stage_duration_seconds";

/// A stage between accept and the first byte that crosses. Capture is the kernel's, and telemetry is
/// not in the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    OrigDst,
    Route,
    Balance,
    Tunnel,
    Authorize,
    Deliver,
}

impl Stage {
    /// All, in the order of a connection's life. The tunnel's time contains that of the two behind it.
    pub(crate) const ALL: [Self; 6] =
        [Self::OrigDst, Self::Route, Self::Balance, Self::Tunnel, Self::Authorize, Self::Deliver];

    /// Its name in the JSON, and what the table calls it.
    pub(crate) fn spec(self) -> (&'static str, &'static str) {
        match self {
            Self::OrigDst => ("stage_us_orig_dst", "... mean of stage orig_dst, from accept on"),
            Self::Route => ("stage_us_route", "... mean of stage route"),
            Self::Balance => ("stage_us_balance", "... mean of stage balance"),
            Self::Tunnel => ("stage_us_tunnel", "... mean of stage tunnel, with the next two"),
            Self::Authorize => ("stage_us_authorize", "... mean of stage authorize"),
            Self::Deliver => ("stage_us_deliver", "... mean of stage deliver"),
        }
    }

    /// Labels of its histogram, and whether the server's agent has it.
    fn histogram(self) -> ([(&'static str, &'static str); 2], bool) {
        let (stage, inbound) = match self {
            Self::OrigDst => ("orig_dst", false),
            Self::Route => ("route", false),
            Self::Balance => ("balance", false),
            Self::Tunnel => ("tunnel", false),
            Self::Authorize => ("authorize", true),
            Self::Deliver => ("deliver", true),
        };
        let direction = if inbound { "inbound" } else { "outbound" };
        ([("stage", stage), ("direction", direction)], inbound)
    }
}

/// Seconds and connections of each stage, since the agents started.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Taken([(f64, f64); Stage::ALL.len()]);

impl Taken {
    /// As both agents tell it now.
    ///
    /// # Errors
    ///
    /// Fails when one does not.
    pub(crate) fn so_far(client: &Agent, server: &Agent) -> Result<Self> {
        let (client, server) = (client.metrics()?, server.metrics()?);
        Ok(Self(Stage::ALL.map(|stage| {
            let (labels, inbound) = stage.histogram();
            let of = |part| {
                let metrics = if inbound { &server } else { &client };
                metrics.sum(&format!("{HISTOGRAM}_{part}"), &labels)
            };
            (of("sum"), of("count"))
        })))
    }

    /// The mean of each stage since `before` in microseconds. Nothing of a stage that no connection
    /// went through.
    pub(crate) fn means_us_since(self, before: Self) -> Vec<(Stage, f64)> {
        let each = Stage::ALL.into_iter().zip(self.0).zip(before.0);
        each.filter_map(|((stage, now), then)| {
            let (seconds, count) = (now.0 - then.0, now.1 - then.1);
            (count > 0.0).then(|| (stage, seconds * 1e6 / count))
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_are_those_of_connections_since_then() {
        let mut before = Taken::default();
        before.0[0] = (1.0, 10.0);
        let mut now = before;
        now.0[0] = (1.002, 12.0);
        now.0[5] = (0.000_3, 1.0);
        let means = now.means_us_since(before);
        let stages: Vec<_> = means.iter().map(|(stage, _)| *stage).collect();
        assert_eq!(stages, [Stage::OrigDst, Stage::Deliver]);
        assert!((means[0].1 - 1_000.0).abs() < 1e-6, "{means:?}");
        assert!((means[1].1 - 300.0).abs() < 1e-6, "{means:?}");
    }
}
