//! How nodes and pods are wired: links, addresses, routes, and kube-proxy's part.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, Result};

use super::{Mesh, Node, Service};
use crate::netns::{Netns, feed, ip};
use crate::pod::Pod;
use crate::topology::{Builder, Family};

impl Mesh {
    /// Makes nodes, links, pods and the addresses of services.
    pub(super) fn lay_out(&mut self, builder: &Builder, id: &str, number: u32) -> Result<()> {
        // A range of its own for every mesh keeps a leak between two of them from looking right.
        let range = u8::try_from((std::process::id() + number) % 100).unwrap_or_default();
        for (index, name) in builder.nodes.iter().enumerate() {
            let index = u8::try_from(index + 1).context("too many nodes")?;
            let netns = Netns::new(&format!("{id}-node-{name}"))?;
            netns.forward()?;
            let v4 = Ipv4Addr::new(10, 100 + range, 0, index);
            let v6 = v6(range, 0, u16::from(index));
            let node = Node {
                agent: None,
                name: name.clone(),
                v4,
                v6,
                only: builder.node_family,
                mtu: builder.mtu,
                netns: Arc::new(netns),
            };
            // A node without a link has an address all the same.
            for ip in node.ips() {
                node.netns.ip(&format!("addr add {ip} dev lo{}\n", without_dad(ip)))?;
            }
            self.nodes.push(node);
        }
        for a in 0..self.nodes.len() {
            for b in a + 1..self.nodes.len() {
                self.link(a, b, range, builder.mtu)?;
            }
        }
        for (index, spec) in builder.pods.iter().enumerate() {
            let host = u8::try_from(index + 2).context("too many pods")?;
            let node = self.nodes.iter().position(|node| node.name == spec.node);
            let node = node.with_context(|| format!("{} is on no node", spec.name))?;
            let subnet = u8::try_from(node + 1).context("too many nodes")?;
            let pod = Pod::new(
                spec.clone(),
                Ipv4Addr::new(10, 100 + range, subnet, host),
                v6(range, u16::from(subnet), u16::from(host)),
                Arc::new(Netns::new(&format!("{id}-pod-{}", spec.name))?),
            );
            self.attach(&pod, node, index, builder.mtu)?;
            self.pods.push(Arc::new(pod));
        }
        for (index, spec) in builder.services.iter().enumerate() {
            let host = u8::try_from(index + 10).context("too many services")?;
            let service = Service {
                v4: Ipv4Addr::new(10, 200, range, host),
                v6: v6(range, 0xffff, u16::from(host)),
            };
            self.services.push((spec.clone(), service));
        }
        Ok(())
    }

    /// Joins two nodes, and routes each other's pods over the link.
    fn link(&self, a: usize, b: usize, range: u8, mtu: u32) -> Result<()> {
        let (from, to) = (&self.nodes[a], &self.nodes[b]);
        let (a_netns, b_netns) = (from.netns.name(), to.netns.name());
        ip(
            None,
            &format!(
                "link add to-{b} netns {a_netns} mtu {mtu} type veth \
                 peer name to-{a} netns {b_netns} mtu {mtu}\n"
            ),
        )?;
        for (node, peer, index, device) in
            [(from, to, b + 1, format!("to-{b}")), (to, from, a + 1, format!("to-{a}"))]
        {
            let pods = v6(range, u16::try_from(index)?, 0);
            let mut wires = format!("link set {device} up\n");
            for (ip, to) in node.ips().zip(peer.ips()) {
                let pods = match ip {
                    IpAddr::V4(_) => format!("10.{}.{index}.0/24", 100 + range),
                    IpAddr::V6(_) => format!("{pods}/64"),
                };
                write!(
                    wires,
                    "addr add {ip} peer {to} dev {device}{}\n\
                     route add {pods} via {to} dev {device} onlink\n",
                    without_dad(ip)
                )?;
            }
            node.netns.ip(&wires)?;
        }
        Ok(())
    }

    /// Plugs a pod into its node.
    fn attach(&self, pod: &Pod, node: usize, index: usize, mtu: u32) -> Result<()> {
        let node = &self.nodes[node];
        let (v4, v6) = (pod.v4_ip(), pod.v6_ip());
        let source = |family, ip: IpAddr| {
            if node.has(family) { format!(" src {ip}") } else { String::new() }
        };
        let (source4, source6) =
            (source(Family::V4, node.v4.into()), source(Family::V6, node.v6.into()));
        ip(
            None,
            &format!(
                "link add p{index} netns {} mtu {mtu} type veth \
                 peer name eth0 netns {} mtu {mtu}\n",
                node.netns.name(),
                pod.netns().name()
            ),
        )?;
        node.netns.ip(&format!(
            "link set p{index} up\n\
             addr add 169.254.1.1/32 dev p{index}\n\
             addr add fe80::1/64 dev p{index} nodad\n\
             route add {v4}/32 dev p{index}{source4}\n\
             route add {v6}/128 dev p{index}{source6}\n"
        ))?;
        pod.netns().ip(&format!(
            "link set eth0 up\n\
             addr add {v4}/32 dev eth0\n\
             addr add {v6}/128 dev eth0 nodad\n\
             route add 169.254.1.1/32 dev eth0 scope link\n\
             route add default via 169.254.1.1 dev eth0\n\
             route add default via fe80::1 dev eth0\n"
        ))
    }

    /// Moves the addresses of `pod` from the namespace of the pod `from`, whose cable is cut, to that of the
    /// pod `to` of the same node, which has its own as well.
    ///
    /// # Errors
    ///
    /// Fails if the system refuses.
    pub(super) fn move_addresses(&self, pod: &Pod, from: &str, to: &str) -> Result<()> {
        let index = |name| self.pods.iter().position(|pod| pod.name() == name).context("no pod");
        let (v4, v6, node) = (pod.v4_ip(), pod.v6_ip(), self.node(pod.node()));
        self.pod(from)
            .netns()
            .ip(&format!("addr del {v4}/32 dev eth0\naddr del {v6}/128 dev eth0\n"))?;
        let (new, from, to) = (self.pod(to), index(from)?, index(to)?);
        new.netns().ip(&format!(
            "addr replace {v4}/32 dev eth0\naddr replace {v6}/128 dev eth0 nodad\n"
        ))?;
        node.netns.ip(&format!(
            "link set p{from} down\n\
             link set p{to} up\n\
             addr replace fe80::1/64 dev p{to} nodad\n\
             route replace {v4}/32 dev p{to} src {}\n\
             route replace {v6}/128 dev p{to} src {}\n",
            node.v4, node.v6
        ))
    }

    /// What kube-proxy would do: a cluster address becomes an endpoint's, at random.
    pub(super) fn translate_services(&self) -> Result<()> {
        let mut rules = String::new();
        for (spec, service) in self.services.iter().filter(|(spec, _)| !spec.pods.is_empty()) {
            let pods: Vec<&Pod> = spec.pods.iter().map(|name| self.pod(name)).collect();
            for (port, target) in &spec.ports {
                for (family, vip) in
                    [(Family::V4, IpAddr::from(service.v4)), (Family::V6, service.v6.into())]
                {
                    let ip = if family == Family::V4 { "ip" } else { "ip6" };
                    let endpoints = pods.iter().enumerate();
                    let endpoints: Vec<String> = endpoints
                        .map(|(index, pod)| format!("{index} : {} . {target}", pod.ip(family)))
                        .collect();
                    writeln!(
                        rules,
                        "{ip} daddr {vip} tcp dport {port} dnat {ip} to numgen random mod {} \
                         map {{ {} }}",
                        endpoints.len(),
                        endpoints.join(", ")
                    )?;
                }
            }
        }
        let table = format!(
            "table inet kube_proxy {{\n chain services {{\n  \
             type nat hook prerouting priority dstnat; policy accept;\n{rules} }}\n}}\n"
        );
        for node in &self.nodes {
            node.netns.run(|| feed(Command::new("nft").args(["-f", "-"]), &table))?;
        }
        Ok(())
    }
}

/// What `ip addr add` is told of an address that is used at once.
fn without_dad(ip: IpAddr) -> &'static str {
    if ip.is_ipv6() { " nodad" } else { "" }
}

/// `fd4d:616c:6c61` is "Malla" in a range for everybody's own use (RFC 4193).
fn v6(range: u8, subnet: u16, host: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd4d, 0x616c, 0x6c61, u16::from(range) << 8, subnet, 0, 0, host)
}
