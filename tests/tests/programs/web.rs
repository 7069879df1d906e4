//! nginx, asked by curl and wrk.

use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};
use harness::{Family, Process, long};

use crate::{World, text};

const PORT: u16 = 8080;
const FILE_BYTES: usize = 8_000_000;

impl World {
    fn url(&self, family: Family, path: &str) -> String {
        format!("http://{}{path}", self.mesh.service("server").addr(family, PORT))
    }

    /// nginx with one large file; whatever it writes goes below the mesh's own directory.
    fn nginx(&self) -> Result<Process> {
        let dir = self.dir("nginx")?;
        fs::create_dir_all(dir.join("www"))?;
        let body: Vec<u8> =
            (0..FILE_BYTES).map(|at| b'a' + u8::try_from(at % 23).unwrap_or(0)).collect();
        fs::write(dir.join("www/large"), body)?;
        fs::write(dir.join("www/medium"), vec![b'm'; 100_000])?;
        fs::write(dir.join("www/small"), "small\n")?;
        let config = format!(
            "daemon off; master_process off; worker_processes 1; pid {dir}/pid;\n\
             error_log {dir}/error; user root;\n\
             events {{ worker_connections 512; }}\n\
             http {{ access_log off; sendfile on; keepalive_timeout 30;\n\
             client_body_temp_path {dir}/t1; proxy_temp_path {dir}/t2;\n\
             fastcgi_temp_path {dir}/t3; uwsgi_temp_path {dir}/t4; scgi_temp_path {dir}/t5;\n\
             server {{ listen {PORT}; listen [::]:{PORT}; root {dir}/www; }} }}\n",
            dir = dir.display()
        );
        fs::write(dir.join("nginx.conf"), config)?;
        let mut command = Command::new("nginx");
        command.arg("-p").arg(&dir).arg("-c").arg(dir.join("nginx.conf"));
        let process = self.server().spawn_command(&mut command)?;
        self.server().wait_for_port(PORT)?;
        Ok(process)
    }
}

#[test]
fn curl_gets_from_nginx_what_it_gets_without_a_mesh() -> Result<()> {
    harness::require!("nginx", "curl", "nft");
    World::all(&[PORT], |world| {
        let _nginx = world.nginx()?;
        let client = world.client();
        let mut all = String::new();
        for family in Family::BOTH {
            let format = "%{http_code} %{size_download} %{num_connects}\\n";
            // One connection for several requests, and several connections at once.
            let (large, small) = (world.url(family, "/large"), world.url(family, "/small"));
            let args = ["-sS", "-g", "-o", "/dev/null", "-o", "/dev/null", "-w", format];
            all += &client.succeed("curl", &[&args[..], &[&large, &small]].concat())?;
            let file = world.mesh.state_dir().join("got");
            client.succeed("curl", &["-sS", "-g", "-o", &text(&file), &large])?;
            let original = fs::read(world.mesh.state_dir().join("nginx/www/large"))?;
            ensure!(fs::read(&file)? == original, "other bytes came");
            all += &client.succeed("curl", &["-sS", "-g", "-i", "-r", "100-200", &large])?;
            all += &client.succeed("curl", &["-sS", "-g", "-Z", &small, &small, &small, &small])?;
        }
        let stable = all.lines().filter(|line| {
            !["Date:", "Last-Modified:", "ETag:"].iter().any(|header| line.starts_with(header))
        });
        Ok(stable.map(str::to_owned).collect::<Vec<_>>())
    })
}

#[test]
fn wrk_sees_no_error_of_nginx() -> Result<()> {
    harness::require!("nginx", "wrk", "nft");
    World::all(&[PORT], |world| {
        let _nginx = world.nginx()?;
        for (path, close) in [("/small", false), ("/small", true), ("/medium", false)] {
            let url = world.url(Family::V4, path);
            let lasts = long::either("1s", "30s");
            let mut args = vec!["-t1", "-c16", "-d", lasts];
            // A connection for every request.
            args.extend(close.then_some(["-H", "Connection: close"]).into_iter().flatten());
            let said = world.client().succeed("wrk", &[&args[..], &[&url]].concat())?;
            long::report(&format!("{} {path} {close}: {}", world.name, rate(&said)));
            ensure!(!said.contains("Socket errors") && !said.contains("Non-2xx"), "{path}: {said}");
            ensure!(said.contains("requests in") && !said.contains(" 0 requests in"), "{said}");
        }
        Ok(())
    })
}

fn rate(said: &str) -> String {
    let lines = said.lines().filter(|line| line.contains("/sec:"));
    lines
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect::<Vec<_>>()
        .join(", ")
}
