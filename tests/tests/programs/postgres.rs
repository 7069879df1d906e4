//! PostgreSQL: transactions by pgbench, notifications, and COPY in both directions.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context as _, Result, ensure};
use harness::{Process, long, wait};

use crate::{World, text};

const PORT: u16 = 5432;

/// A database cluster, made once for all worlds; removed when dropped.
struct Cluster {
    bin: PathBuf,
    dir: PathBuf,
}

impl Cluster {
    fn new() -> Result<Self> {
        // Debian has them apart, by version, and none in the path.
        let versions = fs::read_dir("/usr/lib/postgresql").context("find PostgreSQL")?;
        let bins = versions.filter_map(|version| Some(version.ok()?.path().join("bin")));
        let bin = bins.filter(|bin| bin.join("initdb").is_file()).max().context("no initdb")?;
        let dir = std::env::temp_dir().join(format!("malla-{}-postgres", std::process::id()));
        let this = Self { bin, dir };
        this.as_postgres("install", &["-d", "-m", "700", &text(&this.dir)])?;
        let initdb = text(&this.bin.join("initdb"));
        let data = text(&this.data());
        this.as_postgres(&initdb, &["-D", &data, "-A", "trust", "--no-sync", "-E", "UTF8"])?;
        let hba = this.data().join("pg_hba.conf");
        fs::write(&hba, format!("{}\nhost all all all trust\n", fs::read_to_string(&hba)?))?;
        Ok(this)
    }

    fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// It refuses to be root.
    fn as_postgres(&self, program: &str, args: &[&str]) -> Result<()> {
        let mut command = Command::new("runuser");
        command.args(["-u", "postgres", "--", program]).args(args).current_dir("/");
        let output = command.output().context("start runuser")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program}: {said}");
        Ok(())
    }

    fn serve(&self, world: &World) -> Result<Process> {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--init-groups"]);
        command.arg(self.bin.join("postgres")).arg("-D").arg(self.data());
        let sockets = format!("unix_socket_directories={}", self.dir.display());
        for setting in ["listen_addresses=*", &sockets, "fsync=off", "max_wal_size=4GB"] {
            command.args(["-c", setting]);
        }
        let process = world.server().spawn_command(command.current_dir("/"))?;
        let (host, port) = ("127.0.0.1", PORT.to_string());
        // It listens before it answers.
        wait::until(wait::SOON, "PostgreSQL to be ready", || {
            world.server().succeed("pg_isready", &["-h", host, "-p", &port]).is_ok()
        })?;
        Ok(process)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.dir).ok();
    }
}

impl World {
    fn psql(&self, commands: &[&str]) -> Result<String> {
        let host = self.host();
        let mut args =
            vec!["-h", &host, "-U", "postgres", "-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1"];
        args.extend(commands.iter().flat_map(|command| ["-c", command]));
        self.client().succeed("psql", &args)
    }
}

/// Somebody holds the lock that the other one waits for, so that neither is early.
const LOCKED: &str = "DO $$ BEGIN WHILE NOT EXISTS (SELECT FROM pg_locks \
     WHERE locktype = 'advisory' AND granted) LOOP PERFORM pg_sleep(0.01); END LOOP; END $$";
const WAITED_FOR: &str = "DO $$ BEGIN WHILE NOT EXISTS (SELECT FROM pg_locks \
     WHERE locktype = 'advisory' AND NOT granted) LOOP PERFORM pg_sleep(0.01); END LOOP; END $$";

#[test]
fn postgres_answers_as_without_a_mesh() -> Result<()> {
    harness::require!("/usr/share/postgresql-common/pg_wrapper", "pgbench", "setpriv", "nft");
    let cluster = Cluster::new()?;
    World::all(&[PORT], |world| {
        let _postgres = cluster.serve(world)?;
        let host = world.host();
        let bench = |args: &[&str]| {
            let to = ["-h", &host, "-U", "postgres"];
            world.client().succeed("pgbench", &[&to[..], args, &["postgres"]].concat())
        };
        bench(&["-i", "-q", "-s", "1"])?;
        for connect in [&[][..], &["-C"]] {
            let lasts = long::either("1", "30");
            let said = bench(&[&["-c", "8", "-T", lasts][..], connect].concat())?;
            let tps = said.lines().find(|line| line.starts_with("tps")).unwrap_or_default();
            long::report(&format!("{} pgbench {connect:?}: {tps}", world.name));
            ensure!(said.contains("failed transactions: 0 "), "{said}");
            ensure!(!said.contains("processed: 0\n"), "{said}");
        }

        let heard = thread::scope(|scope| {
            let listening = scope.spawn(|| {
                let take = "SELECT pg_advisory_lock(1)";
                world.psql(&["LISTEN channel", LOCKED, take, "SELECT 'awake'"])
            });
            let told =
                world.psql(&["SELECT pg_advisory_lock(1)", WAITED_FOR, "NOTIFY channel, 'hello'"]);
            let heard = listening.join().unwrap();
            told.and(heard)
        })?;
        ensure!(heard.contains("notification \"channel\" with payload \"hello\""), "{heard}");

        let rows: u64 = long::either(20_000, 1_000_000);
        let query = format!("SELECT i, repeat(md5(i::text), 31) FROM generate_series(1, {rows}) i");
        let file = world.dir("copy")?.join("rows");
        let out = world.psql(&[&format!("\\copy ({query}) TO '{}'", file.display())])?;
        let sum = md5(&file)?;
        let back = world.psql(&[
            "DROP TABLE IF EXISTS rows",
            "CREATE UNLOGGED TABLE rows (i int, t text)",
            &format!("\\copy rows FROM '{}'", file.display()),
            "SELECT count(*), sum(i), md5(string_agg(md5(t), '' ORDER BY i)) FROM rows",
            "DROP TABLE rows",
        ])?;
        fs::remove_file(&file)?;
        Ok((out, sum, back))
    })
}

fn md5(file: &Path) -> Result<String> {
    let output =
        Command::new("md5sum").stdin(fs::File::open(file)?).stderr(Stdio::inherit()).output()?;
    Ok(String::from_utf8(output.stdout)?)
}
