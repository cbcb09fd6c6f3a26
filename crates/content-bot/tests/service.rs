//! The real program, several of it, with a real etcd and a real repository: elect, publish, hand over, refuse, end.

#![cfg(feature = "shell")]

mod fleet;
mod repo;

use std::{fs, io::Write, net::TcpStream, path::Path, process::Command, time::Duration};

use bots_core::{
    machine::Span,
    shell::{
        Clock, http,
        process::{Signal, send_signal},
        testing::free_port,
    },
    wire::{ContentFacts, ContentRevision, Member, Quarantined},
};
use bytes::Bytes;
use fleet::{Bot, DEADLINE, Fleet, SECRET, body, post, signature, site, until};
use repo::{git, unpack};

#[tokio::test]
async fn a_push_goes_live_and_survives_its_leader() {
    let fleet = Fleet::new();
    let first = fleet.repo.push(&[("index.html", b"<h1>one</h1>")]);
    let (mut one, mut two) = (
        Bot::start(&fleet, "one", "poll_interval_s: 3600", ""),
        Bot::start(&fleet, "two", "poll_interval_s: 3600", ""),
    );
    let live = fleet.wait_for_live(&first).await;
    assert_eq!((live.generation, live.reference.as_str(), live.subject.as_str()), (1, "main", "Change index.html"));
    assert_eq!(live.origin, fleet.repo.url());
    let (leader, follower) = fleet.leader_of([&one, &two]).await;

    // The pack goes out from whoever holds the commit; the member key says who that is.
    let (status, pack) = leader.get(&format!("/pack/{first}")).await;
    assert_eq!(status, 200);
    let files = unpack(&fleet.scratch.path().join("unpacked"), &pack, &first);
    assert_eq!(files, [(String::from("index.html"), b"<h1>one</h1>".to_vec())]);
    for bad in ["..", "x", &first[1..], &first.to_uppercase(), &format!("{first}0")] {
        assert_ne!(leader.get(&format!("/pack/{bad}")).await.0, 200, "{bad}");
    }
    // A standby fetches what has gone live, so that it has it when it leads.
    let mut both = vec![leader.url(""), follower.url("")];
    both.sort_unstable();
    let everybody_holds_it = async {
        loop {
            let members = fleet.store().list(&site().members_prefix()).await.expect("etcd answers").1;
            let members = members.iter().filter_map(|kv| Member::from_json(&kv.value));
            let holders =
                members.filter_map(|m| m.facts::<ContentFacts>()).filter(|f| f.holds.as_ref() == Some(&first));
            let mut holders: Vec<String> = holders.map(|facts| facts.pack_url).collect();
            holders.sort_unstable();
            if holders == both {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, everybody_holds_it).await.expect("both hold it");
    assert_eq!(follower.get(&format!("/pack/{first}")).await.0, 200);

    // The poll is an hour away: what follows is due to announcements. They must be signed.
    assert_eq!(leader.push(None).await, 401);
    assert_eq!(leader.push(Some("a guess")).await, 401);
    let second = fleet.repo.push(&[("index.html", b"<h1>two</h1>")]);
    let began = Clock::now();
    assert_eq!(leader.push(Some(SECRET)).await, 202);
    fleet.wait_for_live(&second).await;
    println!("push to live: {}", Clock::now().since(began));
    // A follower hands the announcement on.
    let third = fleet.repo.push(&[("index.html", b"<h1>three</h1>")]);
    let began = Clock::now();
    assert_eq!(follower.push(Some(SECRET)).await, 202);
    fleet.wait_for_live(&third).await;
    println!("push to a follower to live: {}", Clock::now().since(began));

    // A serving web bot must acknowledge. The leader is killed in between: the other one goes on.
    fleet.web_says("w1", None).await;
    let fourth = fleet.repo.push(&[("index.html", b"<h1>four</h1>")]);
    assert_eq!(leader.push(Some(SECRET)).await, 202);
    until("a candidate is posted", async || {
        fleet.value::<ContentRevision>(&site().revision_candidate()).await.filter(|c| c.sha == fourth)
    })
    .await;
    assert_eq!(fleet.live().await.map(|l| l.sha), Some(third));
    let one_led = leader.port == one.port;
    let (killed, heir) = if one_led { (&mut one, &two) } else { (&mut two, &one) };
    killed.kill();
    until("the other one leads", async || (heir.get("/leader").await.0 == 200).then_some(())).await;
    fleet.web_says("w1", Some(&fourth)).await;
    let live = fleet.wait_for_live(&fourth).await;
    assert_eq!(live.generation, 4);
    until("the candidate is gone", async || {
        fleet.store().get(&site().revision_candidate()).await.expect("etcd answers").is_none().then_some(())
    })
    .await;
    killed.restart();
    fleet.leader_of([&one, &two]).await;
}

#[tokio::test]
async fn what_must_not_be_published_is_not() {
    let fleet = Fleet::new();
    let good = fleet.repo.push(&[("index.html", b"good")]);
    let bot = Bot::start(&fleet, "one", "poll_interval_s: 1, size_max_bytes: 50000", "prepare_timeout_s: 1");
    fleet.wait_for_live(&good).await;

    let large = fleet.repo.push(&[("zeros.bin", &[0; 100_000])]);
    let mark: Quarantined =
        until("the commit is quarantined", async || fleet.value(&site().quarantine(&large)).await).await;
    assert!(mark.reason.contains("git.size_max_bytes"), "{}", mark.reason);
    assert_eq!(fleet.live().await.map(|l| l.sha), Some(good.clone()));
    assert!(bot.troubles().await.contains("is quarantined"));

    // The poll sees that the ref points elsewhere: the force-push mends it.
    git(&fleet.repo.work, &["reset", "--quiet", "--hard", &good]);
    fs::remove_file(fleet.repo.work.join("zeros.bin")).unwrap_or_default();
    let mended = fleet.repo.push(&[("index.html", b"mended")]);
    fleet.repo.prune();
    fleet.wait_for_live(&mended).await;

    // While nobody has prepared it, a commit does not go live; who is late alone is not waited for for ever, and is named.
    fleet.web_says("slow", None).await;
    let next = fleet.repo.push(&[("index.html", b"next")]);
    until("the commit is held", async || bot.troubles().await.contains("none of slow has prepared it").then_some(()))
        .await;
    assert_eq!(fleet.live().await.map(|l| l.sha), Some(mended));
    fleet.web_says("w1", Some(&next)).await;
    fleet.wait_for_live(&next).await;
    until("the late bot is named", async || bot.troubles().await.contains("slow had not prepared").then_some(())).await;

    // The origin is gone: that is reported, what is live stays, and all is well when it is back.
    let away = fleet.scratch.path().join("away.git");
    fs::rename(&fleet.repo.bare, &away).expect("rename");
    until("the trouble is reported", async || bot.troubles().await.contains("cannot read file://").then_some(())).await;
    assert_eq!(bot.get("/health").await.0, 200);
    fs::rename(&away, &fleet.repo.bare).expect("rename");
    let last = fleet.repo.push(&[("index.html", b"last")]);
    fleet.web_says("w1", Some(&last)).await;
    fleet.wait_for_live(&last).await;
}

#[tokio::test]
async fn a_bot_ends_with_the_right_code() {
    let fleet = Fleet::new();
    let sha = fleet.repo.push(&[("index.html", b"hi")]);
    let mut first = Bot::start(&fleet, "one", "ref: main", "");
    fleet.wait_for_live(&sha).await;

    // The same name: the second ends, the first is not disturbed.
    let twin = fleet.scratch.path().join("twin.yml");
    let text = fs::read_to_string(&first.config).expect("there");
    let port = free_port().expect("a port").to_string();
    fs::write(&twin, text.replace("one.data", "twin.data").replace(&first.port.to_string(), &port)).expect("write");
    assert_eq!(ending(&twin), (3, "uses the name one"), "{}", first.role().await);
    // The same data directory.
    fs::write(&twin, text.replace("name: one", "name: two").replace(&first.port.to_string(), &port)).expect("write");
    assert_eq!(ending(&twin), (3, "data_dir: another process uses"));
    // An address for strangers that another has.
    let taken = format!("push: {{listen: '127.0.0.1:{}', ", first.port);
    let other = text.replace("one.data", "twin.data").replace("name: one", "name: two");
    let other = other.replace(&first.port.to_string(), &port).replace("push: {", &taken);
    fs::write(&twin, other).expect("write");
    assert_eq!(ending(&twin), (4, "push.listen"));
    // A field that is wrong.
    fs::write(&twin, text.replace("ref: main", "ref: 'not a ref'")).expect("write");
    assert_eq!(ending(&twin), (2, "git.ref"));
    assert_eq!(first.role().await, "watching");

    // Asked to end, it gives the lock back at once.
    send_signal(first.child.id(), Signal::TERM).expect("tell it");
    let status = until("the bot ends", async || first.child.try_wait().expect("ours")).await;
    assert_eq!(status.code(), Some(0));
    assert!(fleet.store().get(&site().leader()).await.expect("etcd answers").is_none(), "the lock is given back");
    assert_eq!(fleet.live().await.map(|l| l.sha), Some(sha), "what is live stays");
}

/// The API hands the whole site to whoever knows its commit, and every page tells which that is.
#[tokio::test]
async fn strangers_announce_at_an_address_of_their_own_and_read_nothing_there() {
    let fleet = Fleet::new();
    let first = fleet.repo.push(&[("index.html", b"private")]);
    let mut bot = Bot::start(&fleet, "one", "poll_interval_s: 3600", "");
    let port = free_port().expect("a port");
    let text = fs::read_to_string(&bot.config).expect("there");
    fs::write(&bot.config, text.replace("push: {", &format!("push: {{listen: '127.0.0.1:{port}', "))).expect("write");
    bot.restart();
    fleet.wait_for_live(&first).await;
    assert_eq!(bot.get(&format!("/pack/{first}")).await.0, 200, "web bots find it where they did");
    let outside = |path: &str| format!("http://127.0.0.1:{port}{path}");
    let pack = format!("/pack/{first}");
    for path in [
        &pack,
        "/",
        "/status",
        "/metrics",
        "/health",
        "/readiness",
        "/leader",
        "/events",
        "/site",
        "/sites/site/status",
    ] {
        let (status, said) = http::get(&outside(path), DEADLINE).await.expect("an answer");
        assert_eq!((status, said.len()), (404, 0), "{path}");
    }
    assert_eq!(http::get(&outside("/liveness"), DEADLINE).await.expect("an answer"), (200, Bytes::new()));
    assert_eq!(http::get(&outside("/push/site"), DEADLINE).await.expect("an answer").0, 405);

    // The poll is an hour away: what follows is due to announcements.
    for (number, path) in ["/push", "/push/site", "/push/site/github"].into_iter().enumerate() {
        let next = fleet.repo.push(&[("index.html", format!("{number}").as_bytes())]);
        let (told, guessed) = (body(), signature("a guess", b"{}"));
        assert_eq!(post(&outside(path), &[], told.clone()).await, 401, "{path}");
        assert_eq!(post(&outside(path), &[("x-hub-signature-256", &guessed)], told.clone()).await, 401, "{path}");
        let signed = signature(SECRET, &told);
        assert_eq!(post(&outside(path), &[("x-hub-signature-256", &signed)], told).await, 202, "{path}");
        fleet.wait_for_live(&next).await;
    }
    // It is the API's too, as before.
    let last = fleet.repo.push(&[("index.html", b"last")]);
    assert_eq!(bot.push(Some(SECRET)).await, 202);
    fleet.wait_for_live(&last).await;
    bot.kill();
    assert!(http::get(&outside("/liveness"), DEADLINE).await.is_err());
}

#[tokio::test]
async fn a_flip_is_measured_from_the_publication_to_the_last_web_bot() {
    let fleet = Fleet::new();
    let first = fleet.repo.push(&[("index.html", b"one")]);
    let bot = Bot::start(&fleet, "one", "poll_interval_s: 3600", "");
    fleet.wait_for_live(&first).await;
    let (whole, skew) = ("content_flip_seconds", "content_flip_skew_seconds");
    assert_eq!((bot.measured(whole).await, bot.measured(skew).await), ((0, 0.0), (0, 0.0)), "nobody serves");
    for web in ["w1", "w2"] {
        fleet.web_serves(web, Some(&first), Some(&first)).await;
    }
    until("the first flip is measured", async || (bot.measured(whole).await.0 == 1).then_some(())).await;
    let before = (bot.measured(whole).await, bot.measured(skew).await);

    let began = Clock::now();
    let second = fleet.repo.push(&[("index.html", b"two")]);
    assert_eq!(bot.push(Some(SECRET)).await, 202);
    for web in ["w1", "w2"] {
        fleet.web_serves(web, Some(&second), Some(&first)).await;
    }
    fleet.wait_for_live(&second).await;
    until("the publication is followed", async || bot.state().await["flip"]["began"].is_array().then_some(())).await;
    fleet.web_serves("w1", Some(&second), Some(&second)).await;
    until("the first web bot is seen", async || (!bot.state().await["flip"]["first"].is_null()).then_some(())).await;
    assert_eq!((bot.measured(whole).await, bot.measured(skew).await), before, "one is behind");
    // So far behind that it can be told from nothing.
    tokio::time::sleep(Duration::from_millis(50)).await;
    fleet.web_serves("w2", Some(&second), Some(&second)).await;
    until("the flip is measured", async || (bot.measured(whole).await.0 == 2).then_some(())).await;
    let took = f64::from(u32::try_from(Clock::now().since(began).as_millis()).expect("short")) / 1_000.0;
    let after = (bot.measured(whole).await, bot.measured(skew).await);
    assert_eq!((after.0.0, after.1.0), (2, 2));
    let (whole, skew) = (after.0.1 - before.0.1, after.1.1 - before.1.1);
    assert!(0.05 <= skew && skew <= whole && whole <= took, "{skew} {whole} {took}");
}

/// A connection on which the head of an announcement was sent, and nothing of its two megabytes.
fn long_announcement_begun(port: u16) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("connect");
    stream.write_all(b"POST /push HTTP/1.1\r\nhost: x\r\ncontent-length: 2000000\r\n\r\n").expect("send");
    stream
}

#[tokio::test]
async fn announcements_are_limited() {
    let fleet = Fleet::new();
    let sha = fleet.repo.push(&[("index.html", b"hi")]);
    let bot = Bot::start(&fleet, "one", "ref: main", "");
    fleet.wait_for_live(&sha).await;
    let mut answers = Vec::new();
    for _announcement in 0..40 {
        answers.push(bot.push(Some(SECRET)).await);
    }
    assert_eq!(answers[0], 202);
    assert!(answers.contains(&429), "{answers:?}");
    let large = Bytes::from(vec![b' '; 3 * 1024 * 1024 + 1]);
    let (method, url) = (hyper::Method::POST, bot.url("/push"));
    let answer = http::request(method, &url, hyper::HeaderMap::new(), large, DEADLINE, 1_000_000).await;
    assert!(answer.map_or(true, |a| a.status == 413), "a body over the limit is not taken in");

    // Strangers who send long ones slowly keep no short one out.
    let slow: Vec<TcpStream> = (0..20).map(|_| long_announcement_begun(bot.port)).collect();
    let began = Clock::now();
    assert!(matches!(bot.push(Some(SECRET)).await, 202 | 429));
    let took = Clock::now().since(began);
    assert!(took < Span::from_secs(2), "{took}");
    drop(slow);

    // Others can reach the API, and no secret is set: nobody may announce.
    let port = free_port().expect("a port");
    let open = fleet.scratch.path().join("open.yml");
    let text = fs::read_to_string(&bot.config).expect("there");
    let text = text.replace("one.data", "open.data").replace("name: one", "name: open");
    let listen = format!("restapi: {{listen: '0.0.0.0:{port}', connect_address: '127.0.0.1:{port}'}}");
    let lines = text.lines().filter(|l| !l.starts_with("push:"));
    let lines: Vec<&str> = lines.map(|l| if l.starts_with("restapi:") { listen.as_str() } else { l }).collect();
    fs::write(&open, lines.join("\n")).expect("write");
    let open = Bot { port, child: Bot::spawn(&open), config: open };
    until("the bot follows", async || (open.role().await == "follower").then_some(())).await;
    assert_eq!(open.push(None).await, 403);
    assert_eq!(open.push(Some(SECRET)).await, 403);
}

#[tokio::test]
async fn a_recorded_delivery_keeps_no_push_out() {
    let fleet = Fleet::new();
    let sha = fleet.repo.push(&[("index.html", b"hi")]);
    let bot = Bot::start(&fleet, "one", "ref: main", "");
    fleet.wait_for_live(&sha).await;
    let recorded = body();
    let signed = signature(SECRET, &recorded);
    for _time in 0..60 {
        assert_eq!(bot.post("/push", &[("x-hub-signature-256", signed.as_str())], recorded.clone()).await, 202);
    }
    let next = fleet.repo.push(&[("index.html", b"there")]);
    assert_eq!(bot.push(Some(SECRET)).await, 202, "it is a push that nobody has announced before");
    fleet.wait_for_live(&next).await;
}

/// The answer to a push does not wait for git.
#[tokio::test]
async fn an_announcement_is_answered_while_the_origin_hangs() {
    let fleet = Fleet::new();
    let origin = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = origin.local_addr().expect("bound").port();
    let bot = Bot::start(&fleet, "one", "ref: main", "");
    let text = fs::read_to_string(&bot.config).expect("there");
    fs::write(&bot.config, text.replace(&fleet.repo.url(), &format!("http://127.0.0.1:{port}/a.git"))).expect("write");
    let mut bot = bot;
    bot.restart();
    let asked = tokio::task::spawn_blocking(move || {
        let (stream, _) = origin.accept().expect("the bot asks");
        (origin, stream)
    });
    let hung = asked.await.expect("no panic");
    for _push in 0..3 {
        let began = Clock::now();
        assert_eq!(bot.push(Some(SECRET)).await, 202);
        let ms = Clock::now().since(began).as_millis();
        assert!(ms < 2_000, "it is answered after {ms} ms");
    }
    drop(hung);
}

#[tokio::test]
async fn every_forge_announces_and_no_delivery_counts_twice() {
    let fleet = Fleet::new();
    let first = fleet.repo.push(&[("index.html", b"one")]);
    let old = fleet.scratch.path().join("old-secret");
    fs::write(&old, "the old one\n").expect("write");
    let mut one = Bot::start(&fleet, "one", "poll_interval_s: 3600", "");
    fleet.wait_for_live(&first).await;
    // A second secret is in force on the other bot: the senders change one by one.
    let two = Bot::start(&fleet, "two", "poll_interval_s: 3600", "");
    let text = fs::read_to_string(&two.config).expect("there");
    let rotating = text.replace("push: {secret:", &format!("push: {{secret_files: ['{}'], secret:", old.display()));
    fs::write(&two.config, rotating).expect("write");
    let mut two = two;
    two.restart();
    until("the other follows", async || (two.role().await == "follower").then_some(())).await;
    assert_eq!(one.push(Some("the old one")).await, 401);
    let second = fleet.repo.push(&[("index.html", b"two")]);
    assert_eq!(two.push(Some("the old one")).await, 202);
    fleet.wait_for_live(&second).await;

    // GitLab, with the commit in the payload and the site in the path.
    let third = fleet.repo.push(&[("index.html", b"three")]);
    let payload = Bytes::from(format!(r#"{{"ref":"refs/heads/main","after":"{third}"}}"#));
    let token = [("x-gitlab-token", SECRET), ("x-gitlab-event", "Push Hook")];
    assert_eq!(one.post("/push/other/gitlab", &token, payload.clone()).await, 404);
    assert_eq!(one.post("/push/site/github", &token, payload.clone()).await, 401);
    assert_eq!(one.post("/push/site/svn", &token, payload.clone()).await, 404);
    assert_eq!(one.post("/push/site/gitlab", &token, payload).await, 202);
    fleet.wait_for_live(&third).await;

    // A ping is answered, another branch is none of ours, and neither is worth a look.
    let looks = one.counted("content_looks").await;
    for (event, path, status) in
        [("ping", "heads/main", 200), ("push", "heads/topic", 202), ("issues", "heads/main", 202)]
    {
        let payload = Bytes::from(format!(r#"{{"ref":"refs/{path}"}}"#));
        let signed = signature(SECRET, &payload);
        let given = [("x-github-event", event), ("x-hub-signature-256", signed.as_str())];
        assert_eq!(one.post("/push/site", &given, payload).await, status, "{event}");
    }
    assert_eq!(one.counted("content_pushes_ignored").await, 2);

    // What was delivered once is known to every bot, also after the elected one is gone.
    let payload = body();
    let signed = signature(SECRET, &payload);
    let given = [("x-hub-signature-256", signed.as_str())];
    assert_eq!(one.post("/push", &given, payload.clone()).await, 202);
    until("the delivery is looked into", async || (one.counted("content_looks").await > looks).then_some(())).await;
    for bot in [&one, &two] {
        assert_eq!(bot.post("/push", &given, payload.clone()).await, 202);
        until("it is known again", async || (bot.counted("content_pushes_replayed").await == 1).then_some(())).await;
    }
    assert_eq!(one.counted("content_looks").await, looks + 1);
    one.kill();
    until("the other leads", async || (two.get("/leader").await.0 == 200).then_some(())).await;
    assert_eq!(two.post("/push", &given, payload).await, 202);
    until("it is still known", async || (two.counted("content_pushes_replayed").await == 2).then_some(())).await;
}

#[tokio::test]
async fn the_poll_counts_what_no_webhook_announced() {
    let fleet = Fleet::new();
    let first = fleet.repo.push(&[("index.html", b"one")]);
    let bot = Bot::start(&fleet, "one", "poll_interval_s: 1", "");
    fleet.wait_for_live(&first).await;
    let told = fleet.repo.push(&[("index.html", b"two")]);
    assert_eq!(bot.push(Some(SECRET)).await, 202);
    fleet.wait_for_live(&told).await;
    let untold = fleet.repo.push(&[("index.html", b"three")]);
    fleet.wait_for_live(&untold).await;
    until("the lost announcement is counted", async || (bot.counted("webhook_missed").await == 1).then_some(())).await;
}

#[tokio::test]
async fn a_bot_may_be_killed_at_any_moment() {
    let fleet = Fleet::new();
    let noise: Vec<u8> = (0..500_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()).collect();
    fleet.repo.push(&[("noise.bin", &noise)]);
    let mut bot = Bot::start(&fleet, "one", "poll_interval_s: 1", "");
    let mut last = String::new();
    for round in 0..12_u8 {
        last = fleet.repo.push(&[("index.html", &[round]), ("noise.bin", &noise[usize::from(round)..])]);
        tokio::time::sleep(Duration::from_millis(40 * u64::from(round))).await;
        bot.restart();
    }
    fleet.wait_for_live(&last).await;
    let (status, pack) = bot.get(&format!("/pack/{last}")).await;
    assert_eq!(status, 200);
    let files = unpack(&fleet.scratch.path().join("unpacked"), &pack, &last);
    assert_eq!(files.len(), 2);
    assert!(bot.child.try_wait().expect("ours").is_none(), "it still runs");
}

/// Runs the program to its end: the code, and which of the expected words its complaint holds.
fn ending(config: &Path) -> (i32, &'static str) {
    let out = Command::new(env!("CARGO_BIN_EXE_content-bot")).arg(config).output().expect("content-bot");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    let complaint = said.lines().last().unwrap_or_default().to_owned();
    let known = ["uses the name one", "data_dir: another process uses", "push.listen", "git.ref"];
    let word = known.into_iter().find(|word| complaint.contains(word)).unwrap_or_else(|| panic!("{said}"));
    (out.status.code().unwrap_or(-1), word)
}
