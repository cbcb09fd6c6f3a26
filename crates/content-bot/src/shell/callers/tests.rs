//! What a call by curl leaves to be seen, on disk and among the processes.

use std::{fs, path::Path, time::Duration};

use bots_core::{machine::Span, shell::Clock};
use hyper::Method;
use tempfile::TempDir;

use super::{Call, clear};

/// What must not be seen.
const TOKEN: &str = "s3cret-of-the-cache";

fn names(folder: &Path) -> Vec<String> {
    let found = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = found.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// The arguments of our children that are called curl.
fn curls() -> Vec<String> {
    let ours = format!("PPid:\t{}\n", std::process::id());
    let processes = fs::read_dir("/proc").expect("Linux").flatten().map(|entry| entry.path());
    let ours = processes.filter(|path| fs::read_to_string(path.join("status")).is_ok_and(|s| s.contains(&ours)));
    let arguments = ours.filter_map(|path| fs::read(path.join("cmdline")).ok());
    let text = arguments.map(|bytes| String::from_utf8_lossy(&bytes).replace('\0', " "));
    text.filter(|text| text.starts_with("curl ")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_by_curl_overlap_and_show_no_secret() {
    let scratch = TempDir::new().expect("scratch");
    // A cache that takes connections, and says nothing for as long as it is looked at.
    let cache = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = cache.local_addr().expect("bound");
    let file = scratch.path().join("token");
    fs::write(&file, TOKEN).expect("write");
    let call = Call {
        method: Method::POST,
        url: format!("https://{address}/purge"),
        headers: Vec::new(),
        header_files: vec![(String::from("x-key"), file)],
        body: String::new(),
    };
    let make = || {
        let (call, folder) = (call.clone(), scratch.path().to_path_buf());
        tokio::spawn(async move { call.make("abc", &folder).await })
    };
    let both = [make(), make()];
    let mut connections = Vec::new();
    for _call in &both {
        let connection = tokio::time::timeout(Duration::from_secs(20), cache.accept()).await;
        connections.push(connection.expect("curl connects").expect("a connection"));
    }
    let seen = curls();
    assert_eq!(seen.len(), 2, "{seen:?}");
    assert!(seen.iter().all(|arguments| !arguments.contains(TOKEN)), "{seen:?}");
    let folder = scratch.path().join("calls");
    let told: Vec<String> = names(&folder).into_iter().filter(|name| name.ends_with(".config")).collect();
    assert_eq!(told.len(), 2, "each has its own: {told:?}");
    for name in told {
        assert!(fs::read_to_string(folder.join(name)).expect("there").contains(TOKEN));
    }
    drop(connections);
    for call in both {
        let ended = call.await.expect("no panic");
        assert!(ended.as_ref().is_err_and(|why| why.contains("curl ended with") && !why.contains(TOKEN)), "{ended:?}");
    }
    assert!(names(&folder).is_empty(), "{:?}", names(&folder));
    // One that is given up leaves nothing, either.
    let given_up = make();
    let began = Clock::now();
    while names(&folder).is_empty() && Clock::now().since(began) < Span::from_secs(20) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    given_up.abort();
    assert!(given_up.await.is_err_and(|e| e.is_cancelled()));
    assert!(names(&folder).is_empty(), "{:?}", names(&folder));
    // Nor does a bot that was killed, once it is back.
    fs::write(folder.join("7.config"), TOKEN).expect("write");
    clear(scratch.path()).expect("cleared");
    assert!(!folder.exists());
}
