//! Variables of the environment that look like a flag's and are none's. clap reads the names that it knows
//! and passes over all others in silence: a flag whose variable is misspelt would keep its default.

use std::collections::BTreeSet;
use std::env;

use clap::{Arg, Command, CommandFactory as _};

use super::Cli;

/// What the variables of all flags begin with.
const PREFIX: &str = "MESH_";

/// A variable that no flag has. Without its value, which may be a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownVariable {
    /// Its name.
    pub name: String,
    /// The flag's variable that it comes close to.
    pub nearest: Option<String>,
}

/// Those that this process has.
pub fn unknown_variables() -> Vec<UnknownVariable> {
    let names = env::vars_os().map(|(name, _value)| name.to_string_lossy().into_owned());
    unknown(&names.collect::<Vec<_>>(), &known(&Cli::command()))
}

/// The variables of the flags of `command` and of every command below it: one environment may serve several.
fn known(command: &Command) -> BTreeSet<String> {
    let own = command.get_arguments().filter_map(Arg::get_env);
    let own = own.map(|name| name.to_string_lossy().into_owned());
    own.chain(command.get_subcommands().flat_map(known)).collect()
}

fn unknown(names: &[String], known: &BTreeSet<String>) -> Vec<UnknownVariable> {
    // Of every Service that it tells of, Kubernetes tells this: a port alone may be a flag's, misspelt.
    let services = names.iter().filter_map(|name| name.strip_suffix("_SERVICE_HOST"));
    let services: Vec<_> = services.collect();
    let is_of_service = |name: &str| services.iter().any(|service| tells_of(name, service));
    let flags = names.iter().filter(|name| name.starts_with(PREFIX) && !is_of_service(name));
    let unknown = flags.filter(|name| !known.contains(*name)).map(|name| UnknownVariable {
        name: name.clone(),
        nearest: nearest(name, known).map(str::to_owned),
    });
    unknown.collect()
}

/// Whether a pod is given this variable because of a Service, `mesh-web` as `MESH_WEB`: its address and
/// ports, and what Docker had for a link (`pkg/kubelet/envvars` of Kubernetes).
fn tells_of(name: &str, service: &str) -> bool {
    let Some(rest) = name.strip_prefix(service) else { return false };
    let words: Vec<_> = rest.split('_').collect();
    match words[..] {
        ["", "SERVICE", "HOST"] | ["", "SERVICE", "PORT", ..] | ["", "PORT"] => true,
        ["", "PORT", number, "TCP" | "UDP" | "SCTP"]
        | ["", "PORT", number, "TCP" | "UDP" | "SCTP", "ADDR" | "PORT" | "PROTO"] => {
            number.parse::<u16>().is_ok()
        }
        _ => false,
    }
}

/// The known variable that `name` differs least from, if only by a letter or two or by what one of them has
/// more at its end.
fn nearest<'a>(name: &str, known: &'a BTreeSet<String>) -> Option<&'a str> {
    let is_close = |known: &&str| {
        difference(name, known) <= 2 || known.starts_with(name) || name.starts_with(*known)
    };
    let close = known.iter().map(String::as_str).filter(is_close);
    close.min_by_key(|known| difference(name, known))
}

/// How much the longer one has between what both begin with and what both end with.
fn difference(a: &str, b: &str) -> usize {
    let start = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    // What the shorter one begins with is not its end too: `LOG` and `LOGG` differ.
    let rest = a.len().min(b.len()) - start;
    let ends = a.bytes().rev().zip(b.bytes().rev()).take(rest);
    a.len().max(b.len()) - start - ends.take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(names: &[&str]) -> Vec<(String, Option<String>)> {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let unknown = unknown(&names, &known(&Cli::command()));
        unknown.into_iter().map(|variable| (variable.name, variable.nearest)).collect()
    }

    #[test]
    fn variables_of_all_commands_are_known() {
        let known = known(&Cli::command());
        for name in ["MESH_TUNNEL_PORT", "MESH_ADMIN_SOCKET", "MESH_BUNDLE_SPREAD_S", "MESH_NAME"] {
            assert!(known.contains(name), "{name}");
        }
        assert!(known.iter().all(|name| name.starts_with(PREFIX)), "{known:?}");
        let names: Vec<_> = known.iter().map(String::as_str).collect();
        assert!(told(&names).is_empty(), "{:?}", told(&names));
    }

    #[test]
    fn misspelt_variable_is_told_with_the_one_that_was_meant() {
        for (name, meant) in [
            ("MESH_TUNEL_PORT", Some("MESH_TUNNEL_PORT")),
            ("MESH_TUNNLE_PORT", Some("MESH_TUNNEL_PORT")),
            ("MESH_POD_CIDR", Some("MESH_POD_CIDRS")),
            ("MESH_DRAIN", Some("MESH_DRAIN_S")),
            ("MESH_DRAIN_SECONDS", Some("MESH_DRAIN_S")),
            ("MESH_LOGG", Some("MESH_LOG")),
            ("MESH_LOG_LEVEL", Some("MESH_LOG")),
            ("MESH_TELEPORT", None),
        ] {
            let expected = [(name.to_owned(), meant.map(str::to_owned))];
            assert_eq!(told(&["MESH_NODE", name, "PATH"]), expected);
        }
    }

    #[test]
    fn variables_of_others_and_of_services_are_left_alone() {
        let of_others = told(&["PATH", "MESH", "MESHED_UP", "mesh_log", "XMESH_LOG"]);
        assert!(of_others.is_empty(), "{of_others:?}");
        let of_services = told(&[
            "MESH_SERVICE_HOST",
            "MESH_SERVICE_PORT",
            "MESH_PORT",
            "MESH_WEB_SERVICE_HOST",
            "MESH_WEB_SERVICE_PORT",
            "MESH_WEB_SERVICE_PORT_HTTP_ALT",
            "MESH_WEB_PORT",
            "MESH_WEB_PORT_80_TCP",
            "MESH_WEB_PORT_80_TCP_PROTO",
            "MESH_WEB_PORT_80_TCP_PORT",
            "MESH_WEB_PORT_80_TCP_ADDR",
            "MESH_WEB_PORT_53_UDP",
            "MESH_WEB_PORT_38412_SCTP_ADDR",
        ]);
        assert!(of_services.is_empty(), "{of_services:?}");
    }

    #[test]
    fn port_is_taken_for_a_service_only_beside_its_address() {
        let told = told(&["MESH_WEB_SERVICE_HOST", "MESH_TUNEL_PORT", "MESH_WEB_PORTS"]);
        let names: Vec<_> = told.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["MESH_TUNEL_PORT", "MESH_WEB_PORTS"]);
    }
}
