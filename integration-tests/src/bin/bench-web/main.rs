//! `make bench-web`: the same site from our static mode and from the distribution's nginx, and the same app behind our
//! app mode and behind nginx's `proxy_pass`, with wrk, on one machine, one after the other.

mod servers;
mod wrk;

use std::{collections::BTreeMap, fs, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, Result};
use clap::Parser;
use fleet::{
    demo::{asked_to_stop, print},
    usage::round,
};
use serde::Serialize;

use self::{
    servers::{LARGE, SMALL, Stand},
    wrk::{Run, Wrk},
};

/// Connections of the throughput runs: more than both servers have threads, few enough for one wrk thread to feed.
const CONNECTIONS: u32 = 64;

/// Connections that ask for a file that takes a noticeable part of a second.
const HUGE_CONNECTIONS: u32 = 4;

/// Measures our web bot beside nginx.
#[derive(Debug, Parser)]
struct Args {
    /// How long each run takes
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// How often each run is done; the median counts
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// The program to measure; a release build
    #[arg(long, default_value = "target/release/web-bot")]
    web_bot: PathBuf,
    /// Where the figures go
    #[arg(long, default_value = "target/bench/web.json")]
    report: PathBuf,
}

/// What is measured of one file or path, ours and nginx's.
#[derive(Debug, Serialize)]
struct Pair {
    what: String,
    ours_rps: f64,
    nginx_rps: f64,
    ratio: f64,
    ours_p50_us: f64,
    nginx_p50_us: f64,
    ours_p99_us: f64,
    nginx_p99_us: f64,
}

/// The report.
#[derive(Debug, Serialize)]
struct Report {
    small_ratio: f64,
    large_ratio: f64,
    /// A request through the proxy beside one to the app itself, one at a time.
    app_added_p50_us: f64,
    app_added_p99_us: f64,
    nginx_added_p50_us: f64,
    nginx_added_p99_us: f64,
    /// The first answer for each of many files of a server that was just started.
    cold_ours_us: f64,
    cold_nginx_us: f64,
    pairs: Vec<Pair>,
    rounds: usize,
    seconds: u64,
    cores: usize,
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    let ended = tokio::select! {
        ended = Box::pin(run(&args)) => ended,
        asked = asked_to_stop() => asked,
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-web: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> Result<()> {
    let mut stand = Box::pin(Stand::start(&args.web_bot)).await?;
    let wrk = Wrk::find(stand.logs())?;
    print("  comparing the first answers\n")?;
    let (cold_ours_us, cold_nginx_us) =
        (stand.first_answers(&stand.ours).await?, stand.first_answers(&stand.nginx).await?);
    let mut pairs = Vec::new();
    for (what, path, header, connections) in [
        ("small file", SMALL, None, CONNECTIONS),
        ("small file, a connection each", SMALL, Some("Connection: close"), CONNECTIONS),
        ("small file, not changed", SMALL, Some("If-Modified-Since: SINCE"), CONNECTIONS),
        ("page with gzip", "/page.html", Some("Accept-Encoding: gzip"), CONNECTIONS),
        ("64 KiB", "/medium.bin", None, CONNECTIONS),
        ("1 MiB", LARGE, None, CONNECTIONS),
        ("32 MiB, from disk", "/huge.bin", None, HUGE_CONNECTIONS),
    ] {
        let pair = pair(args, &wrk, what, (&stand.ours, &stand.nginx), path, header, connections).await?;
        print(&format!("  {what}: ours {:.0}, nginx {:.0} a second\n", pair.ours_rps, pair.nginx_rps))?;
        pairs.push(pair);
    }
    print("  comparing: app\n")?;
    let through = (stand.our_proxy.clone(), stand.nginx_proxy.clone());
    pairs.push(pair(args, &wrk, "app", (&through.0, &through.1), "/", None, CONNECTIONS).await?);
    let one = pair(args, &wrk, "app, one at a time", (&through.0, &through.1), "/", None, 1).await?;
    let app = stand.app.clone();
    let direct = pair(args, &wrk, "the app itself, one at a time", (&app, &app), "/", None, 1).await?;
    let ratio = |what: &str| pairs.iter().find(|p| p.what == what).map_or(0.0, |p| p.ratio);
    let report = Report {
        small_ratio: ratio("small file"),
        large_ratio: ratio("1 MiB"),
        app_added_p50_us: round(one.ours_p50_us - direct.ours_p50_us),
        app_added_p99_us: round(one.ours_p99_us - direct.ours_p99_us),
        nginx_added_p50_us: round(one.nginx_p50_us - direct.ours_p50_us),
        nginx_added_p99_us: round(one.nginx_p99_us - direct.ours_p99_us),
        cold_ours_us,
        cold_nginx_us,
        pairs: pairs.into_iter().chain([one, direct]).collect(),
        rounds: args.rounds,
        seconds: args.seconds,
        cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
    };
    stand.stop().await;
    if let Some(folder) = args.report.parent() {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    let json = serde_json::to_string_pretty(&report).context("write the figures as JSON")?;
    fs::write(&args.report, json + "\n").with_context(|| format!("write {}", args.report.display()))?;
    print(&table(&report))
}

/// Asks both servers in turn, so that whatever else the machine does hits both.
async fn pair(
    args: &Args,
    wrk: &Wrk,
    what: &str,
    (ours, nginx): (&str, &str),
    path: &str,
    header: Option<&str>,
    connections: u32,
) -> Result<Pair> {
    let mut runs: BTreeMap<&str, Vec<Run>> = BTreeMap::new();
    for _ in 0..args.rounds.max(1) {
        for (who, url) in [("nginx", nginx), ("ours", ours)] {
            let url = format!("{url}{path}");
            let header = match header.filter(|h| h.ends_with("SINCE")) {
                Some(_) => Some(format!("If-Modified-Since: {}", servers::last_modified(&url).await?)),
                None => header.map(str::to_owned),
            };
            let run = wrk.run(&url, header.as_deref(), connections, Duration::from_secs(args.seconds)).await?;
            runs.entry(who).or_default().push(run);
        }
    }
    let of = |who: &str, figure: fn(&Run) -> f64| median(runs.get(who).into_iter().flatten().map(figure).collect());
    let (ours_rps, nginx_rps) = (of("ours", |r| r.rps), of("nginx", |r| r.rps));
    Ok(Pair {
        what: what.to_owned(),
        ours_rps,
        nginx_rps,
        ratio: round(ours_rps / nginx_rps),
        ours_p50_us: of("ours", |r| r.p50_us),
        nginx_p50_us: of("nginx", |r| r.p50_us),
        ours_p99_us: of("ours", |r| r.p99_us),
        nginx_p99_us: of("nginx", |r| r.p99_us),
    })
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}

fn table(report: &Report) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(["WHAT", "OURS /S", "NGINX /S", "RATIO", "OURS P50/P99", "NGINX P50/P99"]);
    for pair in &report.pairs {
        table.add_row([
            pair.what.clone(),
            format!("{:.0}", pair.ours_rps),
            format!("{:.0}", pair.nginx_rps),
            format!("{:.2}", pair.ratio),
            format!("{:.0} / {:.0} us", pair.ours_p50_us, pair.ours_p99_us),
            format!("{:.0} / {:.0} us", pair.nginx_p50_us, pair.nginx_p99_us),
        ]);
    }
    let lines: String = table.lines().map(|line| format!("{}\n", line.trim_end())).collect();
    format!(
        "\n{lines}\nfirst answers of a new server: ours {:.0} us, nginx {:.0} us\nadded by the proxy, p50/p99: ours {:.0} / {:.0} us, \
         nginx {:.0} / {:.0} us\n",
        report.cold_ours_us,
        report.cold_nginx_us,
        report.app_added_p50_us,
        report.app_added_p99_us,
        report.nginx_added_p50_us,
        report.nginx_added_p99_us,
    )
}
