//! The shop's pages. Whatever came from another service or a user is escaped.

use std::fmt::Write as _;

use serde_json::Value;

/// The book.
pub(crate) const TITLE: &str = "The Comedy of Errors";
/// A sentence about it, as HTML.
pub(crate) const DESCRIPTION: &str = "A play by <i>William Shakespeare</i>: twin masters, twin \
     servants, one city, and nobody who can tell them apart.";

/// The facts about the book that the page shows, with their keys in the answer of `details`.
const FACTS: [(&str, &str); 7] = [
    ("Author", "author"),
    ("Year", "year"),
    ("Type", "type"),
    ("Pages", "pages"),
    ("Publisher", "publisher"),
    ("Language", "language"),
    ("ISBN-10", "ISBN-10"),
];
const MOST_STARS: i64 = 5;

/// What the page and the API say when `what` could not be had.
pub(crate) fn unavailable(what: &str) -> String {
    format!("Sorry, product {what} are currently unavailable for this book.")
}

/// The front page.
pub(crate) fn index() -> String {
    document(
        "<h1>Bookinfo</h1>\n<p>A shop with one book and four services, for trying a mesh on.</p>\n\
         <ul><li><a href=\"/productpage?u=normal\">As anybody</a></li>\n\
         <li><a href=\"/productpage?u=test\">As a tester</a></li></ul>\n",
    )
}

/// The page of the book; `None` where a service failed.
pub(crate) fn product(
    user: Option<&str>,
    details: Option<&Value>,
    reviews: Option<&Value>,
) -> String {
    let body = format!(
        "{}<h1>{TITLE}</h1>\n<p>{DESCRIPTION}</p>\n<h2>Book details</h2>\n{}<h2>Reviews</h2>\n{}",
        session(user),
        details.map_or_else(|| failed("details"), facts),
        reviews.map_or_else(|| failed("reviews"), opinions),
    );
    document(&body)
}

fn document(body: &str) -> String {
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <title>Simple Bookstore App</title>\n\
         <style>body{{font-family:sans-serif;max-width:50em;margin:2em auto}}\
         blockquote{{border-left:3px solid #ccc;padding-left:1em}}</style>\n\
         </head>\n<body>\n{body}</body>\n</html>\n"
    )
}

fn session(user: Option<&str>) -> String {
    match user {
        Some(user) => format!("<p>{} (<a href=\"/logout\">sign out</a>)</p>\n", escape(user)),
        None => "<form method=\"post\" action=\"/login\">\n\
                 <input name=\"username\" placeholder=\"User name\">\n\
                 <input name=\"passwd\" type=\"password\" placeholder=\"Password\">\n\
                 <button>Sign in</button></form>\n"
            .to_owned(),
    }
}

fn failed(what: &str) -> String {
    format!("<h4>Error fetching product {what}!</h4>\n<p>{}</p>\n", unavailable(what))
}

fn facts(details: &Value) -> String {
    let rows = FACTS.iter().fold(String::new(), |mut rows, (label, key)| {
        // Writing to a `String` cannot fail.
        let _always_ok = writeln!(rows, "<dt>{label}</dt><dd>{}</dd>", shown(&details[*key]));
        rows
    });
    format!("<dl>\n{rows}</dl>\n")
}

fn opinions(reviews: &Value) -> String {
    let list = reviews["reviews"].as_array().map_or(&[][..], Vec::as_slice);
    let mut text = list.iter().fold(String::new(), |mut text, review| {
        let _always_ok = writeln!(
            text,
            "<blockquote><p>{}</p><small>{}</small>{}</blockquote>",
            shown(&review["text"]),
            shown(&review["reviewer"]),
            rating(&review["rating"]),
        );
        text
    });
    let _always_ok = writeln!(
        text,
        "<dl><dt>Reviews served by:</dt><dd>{}</dd><dt>on cluster</dt><dd>{}</dd></dl>",
        shown(&reviews["podname"]),
        shown(&reviews["clustername"]),
    );
    text
}

/// Stars, the reason why there are none, or nothing when the version shows none.
fn rating(rating: &Value) -> String {
    if let Some(stars) = rating["stars"].as_i64() {
        let colour = shown(&rating["color"]);
        // The class names are those that scripts written for the sample look for.
        let glyph = |at| if at < stars { ("star", '\u{2605}') } else { ("star-empty", '\u{2606}') };
        let glyphs = (0..MOST_STARS).map(glyph).fold(String::new(), |mut text, (class, star)| {
            let _always_ok =
                write!(text, "<span class=\"glyphicon glyphicon-{class}\">{star}</span>");
            text
        });
        return format!("<p style=\"color:{colour}\">{glyphs}</p>");
    }
    match rating["error"].as_str() {
        Some(why) => format!("<p><i>{}</i></p>", escape(why)),
        None => String::new(),
    }
}

/// A JSON value as text of a page.
fn shown(value: &Value) -> String {
    value.as_str().map_or_else(|| escape(&value.to_string()), escape)
}

fn escape(text: &str) -> String {
    text.chars().fold(String::new(), |mut escaped, one| {
        match one {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
        escaped
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn reviews(rating: &Value) -> Value {
        let review = json!({ "reviewer": "R", "text": "t", "rating": rating });
        json!({ "podname": "reviews-v3-0", "clustername": "null", "reviews": [review] })
    }

    #[test]
    fn four_stars_are_four_and_an_empty_one_in_their_colour() {
        let page = product(None, None, Some(&reviews(&json!({ "stars": 4, "color": "red" }))));
        assert_eq!(page.matches("glyphicon-star\"").count(), 4);
        assert_eq!(page.matches("glyphicon-star-empty\"").count(), 1);
        assert!(page.contains("color:red"));
        assert!(page.contains("reviews-v3-0"));
        assert!(page.contains("Error fetching product details!"));
        assert!(!page.contains("Error fetching product reviews!"));
    }

    #[test]
    fn no_rating_shows_nothing_and_a_failed_one_says_so() {
        let without = product(None, None, Some(&reviews(&Value::Null)));
        assert!(!without.contains("glyphicon"));
        let why = "Ratings service is currently unavailable";
        let failed = product(None, None, Some(&reviews(&json!({ "error": why }))));
        assert!(failed.contains(why));
    }

    #[test]
    fn what_others_wrote_is_escaped() {
        let details = json!({ "author": "<script>\"&'" });
        let page = product(Some("<b>"), Some(&details), None);
        assert!(page.contains("&lt;script&gt;&quot;&amp;&#39;"));
        assert!(page.contains("&lt;b&gt;") && !page.contains("<b>"));
    }
}
