//! Programs that nobody here wrote, through the mesh and without it.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use harness::{Builder, Carrier, Family, Mesh, Pod, Process, ServiceSpec};

const FILE_BYTES: usize = 8_000_000;

fn builder() -> Builder {
    Mesh::two_nodes_builder()
        .service(ServiceSpec::new("web").port(80, 8080).pods(&["b1"]))
        .service(ServiceSpec::new("redis").port(6379, 6379).pods(&["b1"]))
}

/// One world without a mesh, and one for each carrier: what a program prints must not differ.
fn worlds() -> impl Iterator<Item = (&'static str, Builder)> {
    let carried = Carrier::BOTH.map(|carrier| (carrier.as_str(), builder().carrier(carrier)));
    [("plain", builder().plain())].into_iter().chain(carried)
}

fn url(mesh: &Mesh, family: Family, path: &str) -> String {
    format!("http://{}{path}", mesh.service("web").addr(family, 80))
}

/// nginx in the pod b1 with one large file; whatever it writes goes below the mesh's own directory.
fn nginx(mesh: &Mesh) -> Result<Process> {
    let dir = mesh.state_dir().join("nginx");
    fs::create_dir_all(dir.join("www"))?;
    let body: Vec<u8> =
        (0..FILE_BYTES).map(|at| b'a' + u8::try_from(at % 23).unwrap_or(0)).collect();
    fs::write(dir.join("www/large"), body)?;
    fs::write(dir.join("www/small"), "small\n")?;
    let config = format!(
        "daemon off; master_process off; worker_processes 1; pid {dir}/pid; error_log {dir}/error;\n\
         user root;\n\
         events {{ worker_connections 512; }}\n\
         http {{ access_log off; sendfile on; keepalive_timeout 30;\n\
         client_body_temp_path {dir}/t1; proxy_temp_path {dir}/t2; fastcgi_temp_path {dir}/t3;\n\
         uwsgi_temp_path {dir}/t4; scgi_temp_path {dir}/t5;\n\
         server {{ listen 8080; listen [::]:8080; root {dir}/www; }} }}\n",
        dir = dir.display()
    );
    fs::write(dir.join("nginx.conf"), config)?;
    let mut command = Command::new("nginx");
    command.arg("-p").arg(&dir).arg("-c").arg(dir.join("nginx.conf"));
    let process = mesh.pod("b1").spawn_command(&mut command)?;
    mesh.pod("b1").wait_for_port(8080)?;
    Ok(process)
}

fn redis(pod: &Pod) -> Result<Process> {
    let process = pod.spawn(
        "redis-server",
        &["--port", "6379", "--bind", "*", "-::*", "--protected-mode", "no", "--save", ""],
    )?;
    pod.wait_for_port(6379)?;
    Ok(process)
}

#[test]
fn curl_gets_from_nginx_what_it_gets_without_a_mesh() -> Result<()> {
    harness::require!("nginx", "curl", "nft");
    let mut printed = Vec::new();
    for (world, builder) in worlds() {
        let mesh = builder.start()?;
        let _nginx = nginx(&mesh).with_context(|| world)?;
        let a1 = mesh.pod("a1");
        let mut all = String::new();
        for family in Family::BOTH {
            let format = "%{http_code} %{size_download} %{num_connects}\\n";
            // One connection for several requests, and several connections at once.
            let (large, small) = (url(&mesh, family, "/large"), url(&mesh, family, "/small"));
            let args = ["-sS", "-g", "-o", "/dev/null", "-o", "/dev/null", "-w", format];
            all += &a1.succeed("curl", &[&args[..], &[&large, &small]].concat())?;
            let file = mesh.state_dir().join("got");
            let got = file.display().to_string();
            a1.succeed("curl", &["-sS", "-g", "-o", &got, &large])?;
            let original = fs::read(mesh.state_dir().join("nginx/www/large"))?;
            ensure!(fs::read(&file)? == original, "{world}: other bytes came");
            all += &a1.succeed("curl", &["-sS", "-g", "-i", "-r", "100-200", &large])?;
            all += &a1.succeed("curl", &["-sS", "-g", "-Z", &small, &small, &small, &small])?;
        }
        let stable = all.lines().filter(|line| {
            !["Date:", "Last-Modified:", "ETag:"].iter().any(|header| line.starts_with(header))
        });
        printed.push((world, stable.map(str::to_owned).collect::<Vec<_>>()));
    }
    for (world, lines) in &printed[1..] {
        assert_eq!(lines, &printed[0].1, "{world} differs from plain");
    }
    Ok(())
}

#[test]
fn redis_answers_as_without_a_mesh() -> Result<()> {
    harness::require!("redis-server", "redis-cli", "redis-benchmark", "nft");
    for (world, builder) in worlds() {
        let mesh = builder.start()?;
        let _redis = redis(mesh.pod("b1")).with_context(|| world)?;
        let (a1, service) = (mesh.pod("a1"), mesh.service("redis"));
        for family in Family::BOTH {
            let host = service.addr(family, 6379).ip().to_string();
            let cli = |args: &[&str]| a1.succeed("redis-cli", &[&["-h", &host], args].concat());
            assert_eq!(cli(&["set", "key", "value"])?.trim(), "OK", "{world}");
            assert_eq!(cli(&["get", "key"])?.trim(), "value", "{world}");
            assert_eq!(cli(&["setrange", "big", "4000000", "x"])?.trim(), "4000001", "{world}");
            assert_eq!(cli(&["get", "big"])?.len(), 4_000_002, "{world}");
        }
        let host = service.v4_ip().to_string();
        for (clients, pipeline) in [("1", "1"), ("20", "1"), ("20", "16")] {
            let csv = a1.succeed(
                "redis-benchmark",
                &[
                    "-h",
                    &host,
                    "-n",
                    "3000",
                    "-c",
                    clients,
                    "-P",
                    pipeline,
                    "-t",
                    "set,get,lpush",
                    "--csv",
                ],
            )?;
            let rates = csv
                .lines()
                .filter_map(|line| line.split(',').nth(1)?.trim_matches('"').parse::<f64>().ok());
            let rates: Vec<f64> = rates.collect();
            ensure!(rates.len() == 3 && rates.iter().all(|rate| *rate > 0.0), "{world}: {csv}");
        }
        if world != "plain" {
            let labels = [("source_workload", "a1"), ("connection_security_policy", "mutual_tls")];
            mesh.agent("a").wait_for_metric("istio_tcp_connections_opened_total", &labels, 40.0)?;
        }
    }
    Ok(())
}
