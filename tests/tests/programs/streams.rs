//! Long-lived connections that bytes cross in both directions: iperf3, a WebSocket, SSH.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use harness::{Pattern, Serve, exchange_patterns, long};
use serde_json::Value;

use crate::{World, text};

#[test]
fn iperf3_carries_in_every_direction() -> Result<()> {
    harness::require!("iperf3", "nft");
    World::all(&[5201], |world| {
        let host = world.host();
        let lasts = long::either("1", "30");
        // Not `--bidir`: iperf3 takes for granted that connections arrive in the order in which they were
        // made. Its two connections may pass each other between two agents, and then both ends of each
        // only send. Exchanges in both directions at once are `torture`'s.
        for direction in [&[][..], &["-R"], &["-P", "8"]] {
            // It serves one client and ends.
            let mut server = world.server().spawn("iperf3", &["-s", "-1"])?;
            world.server().wait_for_listener(5201)?;
            let args = ["-c", &host, "-t", lasts, "-J"];
            let said = world.client().succeed("iperf3", &[&args[..], direction].concat())?;
            let said: Value = serde_json::from_str(&said).context("no JSON")?;
            ensure!(said.get("error").is_none(), "{direction:?}: {said}");
            let received = &said["end"]["sum_received"];
            long::report(&format!(
                "{} {direction:?}: {} bit/s",
                world.name, received["bits_per_second"]
            ));
            let got = received["bytes"].as_f64().unwrap_or_default();
            ensure!(got > 0.0, "{direction:?}: nothing was received: {said}");
            server.wait()?;
        }
        Ok(())
    })
}

/// Echoes messages, and answers `bye` by closing with a reason of its own.
const WEBSOCKET_SERVER: &str = "
import asyncio, websockets
async def serve(socket, path=None):
    async for message in socket:
        if message == 'bye':
            await socket.close(4001, 'as you like')
            return
        await socket.send(message)
async def main():
    async with websockets.serve(serve, None, 8765, max_size=None, ping_interval=None):
        await asyncio.Future()
asyncio.run(main())
";

/// Prints what it sees.
const WEBSOCKET_CLIENT: &str = "
import asyncio, hashlib, sys, websockets
async def main():
    async with websockets.connect(sys.argv[1], max_size=None, ping_interval=None) as socket:
        for size in [0, 1, 125, 126, 65535, 65536, int(sys.argv[2])]:
            for message in ['x' * size, b'y' * size]:
                await socket.send(message)
                back = await socket.recv()
                print(size, type(back).__name__, back == message)
        await (await socket.ping())
        many = [socket.send(str(n)) for n in range(1000)]
        await asyncio.gather(*many)
        print([int(await socket.recv()) for _ in range(1000)] == list(range(1000)))
        await socket.send('bye')
        try:
            await socket.recv()
        except websockets.ConnectionClosed as closed:
            print(closed.rcvd.code, closed.rcvd.reason)
asyncio.run(main())
";

#[test]
fn websocket_pair_talks_as_without_a_mesh() -> Result<()> {
    harness::require!("/usr/lib/python3/dist-packages/websockets/__init__.py", "nft");
    World::all(&[8765], |world| {
        let python = "/usr/bin/python3";
        let _server = world.server().spawn(python, &["-c", WEBSOCKET_SERVER])?;
        world.server().wait_for_port(8765)?;
        let url = format!("ws://{}:8765/", world.host());
        let large = long::either("3000000", "100000000");
        let args = ["-c", WEBSOCKET_CLIENT, &url, large];
        let printed = world.client().succeed(python, &args)?;
        ensure!(!printed.contains("False") && printed.ends_with("4001 as you like\n"), "{printed}");
        Ok(printed)
    })
}

/// sshd's own place for what has no privileges, which systemd makes for the service.
struct Place {
    is_ours: bool,
}

impl Place {
    const PATH: &str = "/run/sshd";

    fn make() -> Result<Self> {
        let is_ours = !Path::new(Self::PATH).exists();
        fs::create_dir_all(Self::PATH)?;
        Ok(Self { is_ours })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.is_ours {
            fs::remove_dir(Self::PATH).ok();
        }
    }
}

#[test]
fn ssh_runs_commands_and_forwards_ports() -> Result<()> {
    harness::require!("sshd", "ssh", "ssh-keygen", "nft");
    World::all(&[2222], |world| {
        let dir = world.dir("ssh")?;
        for key in ["host", "user"] {
            let file = text(&dir.join(key));
            world
                .client()
                .succeed("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-f", &file])?;
        }
        let _place = Place::make()?;
        let config = format!(
            "Port 2222\nHostKey {dir}/host\nAuthorizedKeysFile {dir}/user.pub\nStrictModes no\n\
             UsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\nPidFile none\n",
            dir = dir.display()
        );
        fs::write(dir.join("config"), config)?;
        let sshd = ["-D", "-f", &text(&dir.join("config"))];
        let _sshd = world.server().spawn("/usr/sbin/sshd", &sshd)?;
        world.server().wait_for_port(2222)?;
        let (key, to) = (text(&dir.join("user")), format!("root@{}", world.host()));
        let to = [
            "-i",
            &key,
            "-p",
            "2222",
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "BatchMode=yes",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "-o",
            "ExitOnForwardFailure=yes",
            "-q",
            &to,
        ];
        let client = world.client();

        let sent: Vec<u8> = (0..=250).cycle().take(long::either(5_000_000, 500_000_000)).collect();
        fs::write(dir.join("sent"), &sent)?;
        let mut cat = Command::new("ssh");
        cat.args(to).arg("cat").stdin(fs::File::open(dir.join("sent"))?).stdout(Stdio::piped());
        let back = client.netns().spawn(&mut cat)?.wait_with_output()?;
        ensure!(back.status.success() && back.stdout == sent, "{} bytes came", back.stdout.len());
        let code = client.output("ssh", &[&to[..], &["exit 7"]].concat())?.status.code();

        let bytes = long::either(3_000_000, 300_000_000);
        let _server = world.server().serve(8080, Serve::Exchange(bytes))?;
        let forward = ["-N", "-L", "127.0.0.1:9000:127.0.0.1:8080"];
        let _forwarding = client.spawn("ssh", &[&forward[..], &to].concat())?;
        client.wait_for_listener(9000)?;
        let stream = client.connect("127.0.0.1:9000".parse()?)?;
        exchange_patterns(&stream, bytes, Pattern::CLIENT, Pattern::SERVER)?;
        Ok(code)
    })
}
