//! The proxy's runtime socket: commands as HAProxy's text, and its answers read into types. One short conversation each.

use std::{
    collections::HashMap,
    fmt::Write as _,
    io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use crate::machine::{Admin, Backend, Command, Look, Place, Server, Snapshot};

/// How long a conversation may take. HAProxy answers within a millisecond unless it is stopped or out of processors.
const DEADLINE: Duration = Duration::from_secs(2);

/// The largest answer that is taken in: some hundred bytes a server, for the most servers that a sane configuration has.
const ANSWER_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// HAProxy reads a line of commands into one buffer of 16 KiB, and says nothing about what does not fit.
const LINE_BYTES_MAX: usize = 8 * 1024;

/// What is asked after the commands, in one line with the last of them.
const QUESTIONS: &str = "show info;show servers state;show stat";

/// syslog's number for errors: what is at most this is a complaint.
const SEVERITY_ERROR: u8 = 3;

/// What HAProxy says with less severity than it deserves. A change of an address is a warning to it as well.
const UNDERSTATED: [&str; 2] = ["Invalid", "Unknown command"];

/// HAProxy's bits: in maintenance for whatever reason, and draining for whatever reason.
const ADMIN_MAINT: u32 = 0x63;
const ADMIN_DRAIN: u32 = 0x18;

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Nobody listens.
    #[error("nobody listens at {}", .path.display())]
    Absent {
        /// The socket.
        path: PathBuf,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// The conversation broke.
    #[error("the conversation over {} broke: {source}", .path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// What failed.
        source: io::Error,
    },
    /// No complete answer in time.
    #[error("no answer within {DEADLINE:?}")]
    Deadline,
    /// An answer of another shape.
    #[error("an answer that is not HAProxy's: {0}")]
    Shape(&'static str),
}

/// Runs `commands` in order, then looks.
pub async fn converse(path: &Path, commands: &[Command]) -> Look {
    let conversation = async {
        let mut complaints = Vec::new();
        let mut lines = lines(commands).into_iter().peekable();
        while let Some(line) = lines.next() {
            let answer = ask(path, &line).await?;
            complaints.extend(complaints_in(&answer));
            if lines.peek().is_none() {
                return Ok((snapshot(&answer)?, complaints));
            }
        }
        Err(SocketError::Shape("nothing was asked"))
    };
    match tokio::time::timeout(DEADLINE, conversation).await {
        Ok(Ok((snapshot, complaints))) => Look::Up { snapshot, complaints },
        Ok(Err(error @ SocketError::Absent { .. })) => Look::Absent { why: error.to_string() },
        Ok(Err(error)) => Look::Silent { why: error.to_string() },
        Err(_elapsed) => Look::Silent { why: SocketError::Deadline.to_string() },
    }
}

/// One connection: a line of commands, and all that comes back.
async fn ask(path: &Path, line: &str) -> Result<String, SocketError> {
    let broken = |source| SocketError::Broken { path: path.to_owned(), source };
    let mut stream = UnixStream::connect(path).await.map_err(|source| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            SocketError::Absent { path: path.to_owned(), source }
        }
        _ => broken(source),
    })?;
    stream.write_all(line.as_bytes()).await.map_err(broken)?;
    let mut answer = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer).await.map_err(broken)?;
    Ok(answer)
}

/// The commands as lines that HAProxy takes in whole; the last one ends with the questions. All but very long batches
/// are one line, hence one connection.
fn lines(commands: &[Command]) -> Vec<String> {
    const BEGIN: &str = "set severity-output number";
    let mut lines = Vec::new();
    let mut line = String::from(BEGIN);
    for command in commands {
        let text = text(command);
        if line.len() + text.len() + QUESTIONS.len() + 2 > LINE_BYTES_MAX {
            line.push('\n');
            lines.push(std::mem::replace(&mut line, String::from(BEGIN)));
        }
        let _infallible = write!(line, ";{text}");
    }
    let _infallible = writeln!(line, ";{QUESTIONS}");
    lines.push(line);
    lines
}

fn text(command: &Command) -> String {
    match command {
        Command::SetAddress { place, serve, check } => format!(
            "set server {place} addr {} port {};set server {place} check-addr {} port {}",
            serve.ip(),
            serve.port(),
            check.ip(),
            check.port()
        ),
        Command::SetAdmin { place, admin } => {
            let word = match admin {
                Admin::Ready => "ready",
                Admin::Drain => "drain",
                Admin::Maint => "maint",
            };
            format!("set server {place} state {word}")
        }
        Command::SetWeight { place, weight } => format!("set server {place} weight {weight}"),
        Command::SetUp { place } => format!("set server {place} health up"),
        Command::ShutSessions { place } => format!("shutdown sessions server {place}"),
    }
}

/// Lines such as `[3]: No such server.`
fn complaints_in(answer: &str) -> Vec<String> {
    let complaint = |line: &str| {
        let (severity, text) = line.strip_prefix('[')?.split_once("]: ")?;
        let severity: u8 = severity.parse().ok()?;
        let complains = severity <= SEVERITY_ERROR || UNDERSTATED.iter().any(|word| text.starts_with(word));
        complains.then(|| text.trim().to_owned())
    };
    answer.lines().filter_map(complaint).collect()
}

/// Reads the answers to [`QUESTIONS`].
fn snapshot(answer: &str) -> Result<Snapshot, SocketError> {
    let pid = answer.lines().find_map(|line| line.strip_prefix("Pid: "));
    let pid = pid.and_then(|pid| pid.trim().parse().ok()).ok_or(SocketError::Shape("no process id"))?;
    let sessions = sessions(answer)?;
    let mut lines = answer.lines().skip_while(|line| !line.starts_with("# be_id "));
    let header: Vec<&str> = lines.next().ok_or(SocketError::Shape("no servers"))?[2..].split(' ').collect();
    let mut servers = Vec::new();
    for line in lines.take_while(|line| !line.is_empty()) {
        let fields: HashMap<&str, &str> = header.iter().copied().zip(line.split(' ')).collect();
        if let Some(server) = server(&fields, &sessions) {
            servers.push(server);
        }
    }
    Ok(Snapshot { pid, servers })
}

/// One line of `show servers state`; nothing if it is not a server of our backends.
fn server(fields: &HashMap<&str, &str>, sessions: &HashMap<(String, String), u64>) -> Option<Server> {
    let field = |name: &str| fields.get(name).copied();
    let number = |name: &str| field(name)?.parse::<u32>().ok();
    let socket = |address: &str, port: &str| {
        let address: IpAddr = field(address)?.parse().ok()?;
        let port: u16 = field(port)?.parse().ok().filter(|port| *port > 0)?;
        Some(SocketAddr::new(address, port))
    };
    let backend = Backend::ALL.into_iter().find(|b| Some(b.name()) == field("be_name"))?;
    let slot = field("srv_name")?.to_owned();
    let admin = number("srv_admin_state")?;
    Some(Server {
        sessions: sessions.get(&(backend.name().to_owned(), slot.clone())).copied().unwrap_or(0),
        place: Place { backend, slot },
        serve: socket("srv_addr", "srv_port"),
        check: socket("srv_check_addr", "srv_check_port"),
        admin: match admin {
            _ if admin & ADMIN_MAINT != 0 => Admin::Maint,
            _ if admin & ADMIN_DRAIN != 0 => Admin::Drain,
            _ => Admin::Ready,
        },
        up: number("srv_op_state")? > 0,
        weight: number("srv_uweight")?,
    })
}

/// The current sessions of every server, from `show stat`.
fn sessions(answer: &str) -> Result<HashMap<(String, String), u64>, SocketError> {
    let mut lines = answer.lines().skip_while(|line| !line.starts_with("# pxname,"));
    let header: Vec<&str> = lines.next().ok_or(SocketError::Shape("no statistics"))?[2..].split(',').collect();
    let column = |name: &str| header.iter().position(|h| *h == name).ok_or(SocketError::Shape("no such column"));
    let (proxy, server, current) = (column("pxname")?, column("svname")?, column("scur")?);
    let mut found = HashMap::new();
    for line in lines.take_while(|line| !line.is_empty()) {
        let fields: Vec<&str> = line.split(',').collect();
        if let (Some(proxy), Some(server), Some(current)) = (fields.get(proxy), fields.get(server), fields.get(current))
        {
            found.insert(((*proxy).to_owned(), (*server).to_owned()), current.parse().unwrap_or(0));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::{Admin, Backend, Command, LINE_BYTES_MAX, Place, complaints_in, lines, snapshot};

    const ANSWER: &str = "\
[4]: no need to change the addr, port changed from '1' to '22001' by 'stats socket command'
[4]: Invalid addr 'foo.bar' by 'stats socket command'
[3]: No such server.

Name: HAProxy
Pid: 4711

1
# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight srv_port srv_check_port srv_check_addr
2 primary 1 pg1 10.0.0.1 2 4 100 5432 8008 10.0.0.9
2 primary 2 pg2 ::1 0 12 100 5432 8008 ::1
2 primary 3 pg3 127.0.0.1 0 5 100 1 0 -
3 other 1 x 127.0.0.1 2 0 100 1 0 -

# pxname,svname,qcur,qmax,scur,smax
primary,FRONTEND,,,9,9
primary,pg1,0,0,7,9
primary,pg2,0,0,0,9
other,x,0,0,3,9

";

    #[test]
    fn an_answer_is_read() {
        let read = snapshot(ANSWER).expect("HAProxy's");
        assert_eq!(read.pid, 4711);
        assert_eq!(read.servers.len(), 3, "backends of others are left out");
        let [one, two, three] = &read.servers[..] else { panic!("three servers") };
        assert_eq!(one.serve, Some("10.0.0.1:5432".parse().expect("an address")));
        assert_eq!(one.check, Some("10.0.0.9:8008".parse().expect("an address")));
        assert_eq!((one.admin, one.up, one.sessions, one.weight), (Admin::Ready, true, 7, 100));
        assert_eq!(two.serve, Some("[::1]:5432".parse().expect("an address")));
        assert_eq!((two.admin, two.up), (Admin::Drain, false));
        assert_eq!((three.admin, three.check), (Admin::Maint, None));
        assert_eq!(complaints_in(ANSWER), ["Invalid addr 'foo.bar' by 'stats socket command'", "No such server."]);
    }

    #[test]
    fn no_answer_and_half_an_answer_are_errors() {
        for cut in ["", "Pid: 4711\n", &ANSWER[..ANSWER.find("# pxname").expect("there")]] {
            assert!(snapshot(cut).is_err(), "{cut}");
        }
    }

    #[test]
    fn a_batch_is_one_line_unless_it_is_too_long_for_one() {
        let place = Place { backend: Backend::Primary, slot: String::from("pg1") };
        let set = Command::SetAdmin { place: place.clone(), admin: Admin::Ready };
        let wanted = "set severity-output number;set server primary/pg1 state ready;shutdown sessions server primary/pg1;\
                      show info;show servers state;show stat\n";
        assert_eq!(lines(&[set.clone(), Command::ShutSessions { place }]), [wanted]);
        let long = lines(&vec![set; 1_000]);
        assert!(long.len() > 1 && long.iter().all(|l| l.len() <= LINE_BYTES_MAX && l.ends_with('\n')), "{long:?}");
    }
}
