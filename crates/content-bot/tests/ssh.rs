//! An origin over ssh, against a real sshd on loopback: hosts are known by their keys, and what is replaced on disk is read anew.
//! Only where sshd is not installed does the test stand aside, and says so.

#![cfg(feature = "shell")]

mod repo;

use std::{
    fs,
    net::{Ipv4Addr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use bots_core::{
    machine::Span,
    shell::{Clock, testing::free_port},
};
use content_bot::{
    machine::{FetchResult, PollResult, Reference},
    shell::{
        guard::Stop,
        mirror::Mirror,
        origin::{Credentials, Limits, Origin},
        source::Source,
    },
};
use repo::Repo;
use tempfile::TempDir;

const LIMITS: Limits =
    Limits { size_max: 10_000_000, files_max: 100, look: Duration::from_secs(20), fetch: Duration::from_secs(20) };

/// sshd wants a folder of this name when root starts it; its package has the system make it at boot.
const PRIVILEGE_SEPARATION: &str = "/run/sshd";

#[test]
fn a_host_is_known_by_its_key_and_what_is_replaced_on_disk_is_read_anew() {
    let scratch = TempDir::new().expect("scratch");
    let repo = Repo::new(scratch.path());
    let sha = repo.push(&[("page", b"over ssh")]);
    let file = |name: &str| scratch.path().join(name);
    for (name, kind) in
        [("host", "ed25519"), ("host_rsa", "rsa"), ("stranger", "ed25519"), ("user", "ed25519"), ("other", "ed25519")]
    {
        make_key(&file(name), kind);
    }
    let Some(server) = Sshd::start(scratch.path(), &[file("host_rsa"), file("host")], &file("user.pub")) else {
        return;
    };
    let (known, key) = (file("known_hosts"), file("key"));
    let known_by =
        |public: &Path| format!("[127.0.0.1]:{} {}", server.port, fs::read_to_string(public).expect("a key"));

    fs::write(&known, known_by(&file("stranger.pub"))).expect("write");
    fs::copy(file("user"), &key).expect("copy");
    let url = format!("ssh://{}@127.0.0.1:{}{}", user(), server.port, repo.bare.display());
    let credentials = Credentials {
        ssh_key_file: Some(key.clone()),
        known_hosts_file: Some(known.clone()),
        ..Credentials::default()
    };
    let origin = Origin::new(Source::parse(&url).expect("an address"), Reference::parse("main"), credentials);
    let mirror = Mirror::open(&file("data"), origin, LIMITS, Stop::default()).expect("a mirror");
    let look = || mirror.origin().look(Stop::default(), LIMITS.look);
    let why = || match look() {
        PollResult::Failed { why } => why,
        other => panic!("{other:?}"),
    };

    let complaint = why();
    let fix = format!("git.known_hosts_file: add it with `ssh-keyscan -p {} 127.0.0.1`", server.port);
    assert!(complaint.contains(&fix), "{complaint}");
    // As `HashKnownHosts` leaves it, and with one of the server's two keys alone, as who has connected once has it.
    fs::write(&known, known_by(&file("host.pub"))).expect("write");
    run(Command::new("ssh-keygen").args(["-q", "-H", "-f"]).arg(&known));
    assert!(fs::read_to_string(&known).expect("read").starts_with("|1|"), "the host is hashed");
    assert_eq!(look(), PollResult::Found { sha: sha.clone() });

    fs::copy(file("other"), &key).expect("copy");
    let complaint = why();
    assert!(complaint.contains("git.ssh_key_file"), "{complaint}");
    fs::copy(file("user"), &key).expect("copy");
    assert_eq!(mirror.fetch(&sha), FetchResult::Complete);
}

/// A server, ended when it is dropped.
struct Sshd {
    port: u16,
    child: Child,
}

impl Sshd {
    fn start(dir: &Path, host_keys: &[PathBuf], authorized: &Path) -> Option<Self> {
        let Some(program) = ["/usr/sbin/sshd", "/usr/local/sbin/sshd"].into_iter().find(|p| Path::new(p).exists())
        else {
            eprintln!("\n!!! SKIPPED: ssh is NOT tested: there is no sshd; install openssh-server\n");
            return None;
        };
        if rustix::process::geteuid().is_root() {
            fs::create_dir_all(PRIVILEGE_SEPARATION).expect("the folder that sshd asks for");
        }
        let port = free_port().expect("a port");
        let keys: String = host_keys.iter().map(|key| format!("HostKey {}\n", key.display())).collect();
        let config = format!(
            "ListenAddress 127.0.0.1\nPort {port}\n{keys}AuthorizedKeysFile {}\nPidFile none\nStrictModes no\nUsePAM no\n\
             PasswordAuthentication no\nKbdInteractiveAuthentication no\n",
            authorized.display()
        );
        fs::write(dir.join("sshd_config"), config).expect("write");
        let log = fs::File::create(dir.join("sshd.log")).expect("a log");
        let mut command = Command::new(program);
        command.args(["-D", "-e", "-f"]).arg(dir.join("sshd_config")).stdin(Stdio::null()).stderr(log);
        let server = Self { port, child: command.spawn().expect("sshd starts") };
        let began = Clock::now();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            let log = || fs::read_to_string(dir.join("sshd.log")).unwrap_or_default();
            assert!(Clock::now().since(began) < Span::from_secs(20), "sshd does not listen: {}", log());
            thread::sleep(Duration::from_millis(20));
        }
        Some(server)
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _gone_already = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn make_key(path: &Path, kind: &str) {
    run(Command::new("ssh-keygen").args(["-q", "-t", kind, "-N", "", "-C", "", "-f"]).arg(path));
}

fn run(command: &mut Command) {
    let done = command.output().expect("ssh's programs are installed");
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// Who runs this test: sshd logs nobody else in, unless root starts it.
fn user() -> String {
    let done = Command::new("id").arg("-un").output().expect("id is installed");
    String::from_utf8_lossy(&done.stdout).trim().to_owned()
}
