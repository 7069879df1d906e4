//! `reviews`: two reviews of the book, in v2 and v3 with the stars that `ratings` knows.

use clap::ValueEnum;
use hyper::{HeaderMap, Method, StatusCode};
use serde_json::{Value, json};

use crate::backend::{Backend, Limits};
use crate::call::{Call, Reply, error, healthy, json};
use crate::headers::hand_on;

/// What the reviewers wrote.
const REVIEWS: [(&str, &str); 2] = [
    (
        "Reviewer1",
        "Two pairs of twins, one mistake after the other: I laughed until the last page.",
    ),
    ("Reviewer2", "Light, quick and loud. The later plays go deeper, but none is over so soon."),
];

/// Which of the three to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Version {
    /// No stars: does not ask `ratings`.
    V1,
    /// Black stars, and patience with `ratings`.
    V2,
    /// Red stars.
    V3,
}

impl Version {
    /// The colour of its stars.
    pub(crate) fn colour(self) -> Option<&'static str> {
        match self {
            Self::V1 => None,
            Self::V2 => Some("black"),
            Self::V3 => Some("red"),
        }
    }
}

/// The service.
#[derive(Debug)]
pub(crate) struct Reviews {
    /// Which version it is.
    pub(crate) version: Version,
    /// The pod's name, shown in the answer.
    pub(crate) pod: String,
    /// The cluster's name; the sample shows the text `null` without one.
    pub(crate) cluster: Option<String>,
    /// Where the stars come from.
    pub(crate) ratings: Backend,
    /// How long they may take.
    pub(crate) limits: Limits,
}

impl Reviews {
    /// Answers `/health` and `/reviews/{id}`.
    pub(crate) async fn answer(&self, call: &Call) -> Reply {
        match (&call.method, call.segments().as_slice()) {
            (&Method::GET, ["health"]) => healthy("Reviews"),
            (&Method::GET, ["reviews", id]) => match id.parse() {
                Ok(id) => json(StatusCode::OK, &self.of_product(id, &call.headers).await),
                Err(_not_a_number) => {
                    error(StatusCode::BAD_REQUEST, "please provide numeric product id")
                }
            },
            _ => error(StatusCode::NOT_FOUND, "not found"),
        }
    }

    async fn of_product(&self, id: u64, incoming: &HeaderMap) -> Value {
        let stars = match self.version.colour() {
            None => Stars::NotShown,
            Some(colour) => Stars::Shown {
                colour,
                ratings: self
                    .ratings
                    .get(&format!("/ratings/{id}"), hand_on(incoming), self.patience())
                    .await
                    .json(),
            },
        };
        json!({
            "id": id.to_string(),
            "podname": self.pod,
            "clustername": self.cluster.as_deref().unwrap_or("null"),
            "reviews": REVIEWS.map(|(reviewer, text)| stars.review(reviewer, text)),
        })
    }

    fn patience(&self) -> std::time::Duration {
        match self.version {
            Version::V2 => self.limits.black_stars,
            Version::V1 | Version::V3 => self.limits.other_stars,
        }
    }
}

/// What is known of the stars when the reviews are written out.
enum Stars {
    NotShown,
    Shown { colour: &'static str, ratings: Option<Value> },
}

impl Stars {
    fn review(&self, reviewer: &str, text: &str) -> Value {
        let mut review = json!({ "reviewer": reviewer, "text": text });
        if let Self::Shown { colour, ratings } = self {
            let stars = ratings.as_ref().and_then(|found| found["ratings"][reviewer].as_i64());
            review["rating"] = match stars {
                Some(stars) => json!({ "stars": stars, "color": colour }),
                None => json!({ "error": "Ratings service is currently unavailable" }),
            };
        }
        review
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ratings() -> Option<Value> {
        Some(json!({ "id": 0, "ratings": { "Reviewer1": 5, "Reviewer2": 4 } }))
    }

    #[test]
    fn v1_shows_no_stars_v2_black_ones_v3_red_ones() {
        assert_eq!(Version::V1.colour(), None);
        assert_eq!(Version::V2.colour(), Some("black"));
        assert_eq!(Version::V3.colour(), Some("red"));
        assert!(Stars::NotShown.review("Reviewer1", "").get("rating").is_none());
        let red = Stars::Shown { colour: "red", ratings: ratings() };
        assert_eq!(red.review("Reviewer2", "")["rating"], json!({ "stars": 4, "color": "red" }));
    }

    #[test]
    fn stars_that_are_missing_are_an_error_in_their_place() {
        let expected = json!({ "error": "Ratings service is currently unavailable" });
        let failed = Stars::Shown { colour: "black", ratings: None };
        assert_eq!(failed.review("Reviewer1", "")["rating"], expected);
        let stranger = Stars::Shown { colour: "black", ratings: ratings() };
        assert_eq!(stranger.review("Reviewer3", "")["rating"], expected);
    }
}
