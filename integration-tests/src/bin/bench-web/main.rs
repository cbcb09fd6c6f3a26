//! `make bench-web`: the same site from our static mode and from the distribution's nginx, and the same app behind our
//! app mode and behind nginx's `proxy_pass`, with wrk, on one machine, one after the other.

mod servers;
mod wrk;

use std::{collections::BTreeMap, fs, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, Result};
use clap::Parser;
use fleet::{
    program::{print, run_program},
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

/// What the figures of the report are of.
const SMALL_FILE: &str = "small file";
const LARGE_FILE: &str = "1 MiB";
const APP_ONE: &str = "app, one at a time";
const APP_ITSELF: &str = "the app itself, one at a time";

/// Measures our web bot beside nginx.
#[derive(Debug, Parser)]
struct Args {
    /// How long each run takes
    #[arg(long, default_value_t = 2)]
    seconds: u64,
    /// How often each run is done, on both sides in turn; medians count
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Measure only what has this in its name, and leave the report as it is
    #[arg(long)]
    only: Option<String>,
    /// The program to measure; a release build
    #[arg(long, default_value = "target/release/web-bot")]
    web_bot: PathBuf,
    /// Where the figures go
    #[arg(long, default_value = "target/bench/web.json")]
    report: PathBuf,
}

/// What is measured of one file or path, ours and nginx's. Each figure is a median of all runs; the ratio is the median of
/// the ratios of two runs that followed each other, so that a machine that is busy for a while weighs on neither side.
#[derive(Debug, Serialize)]
struct Pair {
    what: String,
    ours_rps: f64,
    nginx_rps: f64,
    ratio: f64,
    ratio_min: f64,
    ratio_max: f64,
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
    run_program("bench-web", run(&args)).await
}

async fn run(args: &Args) -> Result<()> {
    let (nginx, wrk) = (servers::find_nginx()?, Wrk::find()?);
    let mut stand = Box::pin(Stand::start(&args.web_bot, &nginx)).await?;
    let wrk = wrk.logging_to(stand.logs());
    print("  comparing the first answers\n")?;
    let (cold_ours_us, cold_nginx_us) =
        (stand.first_answers(&stand.ours).await?, stand.first_answers(&stand.nginx).await?);
    let files = (stand.ours.as_str(), stand.nginx.as_str());
    let proxies = (stand.our_proxy.as_str(), stand.nginx_proxy.as_str());
    let app = (stand.app.as_str(), stand.app.as_str());
    let mut pairs = Vec::new();
    for (what, sides, path, header, connections) in [
        (SMALL_FILE, files, SMALL, None, CONNECTIONS),
        ("small file, a connection each", files, SMALL, Some("Connection: close"), CONNECTIONS),
        ("small file, not changed", files, SMALL, Some("If-Modified-Since: SINCE"), CONNECTIONS),
        ("page with gzip", files, "/page.html", Some("Accept-Encoding: gzip"), CONNECTIONS),
        ("64 KiB", files, "/medium.bin", None, CONNECTIONS),
        (LARGE_FILE, files, LARGE, None, CONNECTIONS),
        ("32 MiB, from disk", files, "/huge.bin", None, HUGE_CONNECTIONS),
        ("app", proxies, "/", None, CONNECTIONS),
        (APP_ONE, proxies, "/", None, 1),
        (APP_ITSELF, app, "/", None, 1),
    ] {
        if args.only.as_deref().is_some_and(|only| !what.contains(only)) {
            continue;
        }
        let pair = pair(args, &wrk, what, sides, path, header, connections).await?;
        print(&format!(
            "  {what}: ours {:.0}, nginx {:.0} a second, ratio {:.2} ({:.2} to {:.2})\n",
            pair.ours_rps, pair.nginx_rps, pair.ratio, pair.ratio_min, pair.ratio_max
        ))?;
        pairs.push(pair);
    }
    stand.stop().await;
    if args.only.is_some() {
        return Ok(());
    }
    let report = report(args, pairs, cold_ours_us, cold_nginx_us)?;
    if let Some(folder) = args.report.parent() {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    let json = serde_json::to_string_pretty(&report).context("write the figures as JSON")?;
    fs::write(&args.report, json + "\n").with_context(|| format!("write {}", args.report.display()))?;
    print(&table(&report))
}

fn report(args: &Args, pairs: Vec<Pair>, cold_ours_us: f64, cold_nginx_us: f64) -> Result<Report> {
    let of = |what: &str| pairs.iter().find(|p| p.what == what).with_context(|| format!("{what} was measured"));
    let (small, large, one, direct) = (of(SMALL_FILE)?, of(LARGE_FILE)?, of(APP_ONE)?, of(APP_ITSELF)?);
    Ok(Report {
        small_ratio: small.ratio,
        large_ratio: large.ratio,
        app_added_p50_us: round(one.ours_p50_us - direct.ours_p50_us),
        app_added_p99_us: round(one.ours_p99_us - direct.ours_p99_us),
        nginx_added_p50_us: round(one.nginx_p50_us - direct.ours_p50_us),
        nginx_added_p99_us: round(one.nginx_p99_us - direct.ours_p99_us),
        cold_ours_us,
        cold_nginx_us,
        rounds: args.rounds,
        seconds: args.seconds,
        cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        pairs,
    })
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
    let both = runs.get("ours").into_iter().flatten().zip(runs.get("nginx").into_iter().flatten());
    let ratios: Vec<f64> = both.map(|(ours, nginx)| round(ours.rps / nginx.rps)).collect();
    Ok(Pair {
        what: what.to_owned(),
        ours_rps: of("ours", |r| r.rps),
        nginx_rps: of("nginx", |r| r.rps),
        ratio_min: ratios.iter().copied().fold(f64::INFINITY, f64::min),
        ratio_max: ratios.iter().copied().fold(0.0, f64::max),
        ratio: median(ratios),
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
    // One after the other, once for each file: a mean, and no percentiles.
    table.add_row([
        String::from("first answer, server just started"),
        format!("{:.0}", 1e6 / report.cold_ours_us),
        format!("{:.0}", 1e6 / report.cold_nginx_us),
        format!("{:.2}", report.cold_nginx_us / report.cold_ours_us),
        format!("mean {:.0} us", report.cold_ours_us),
        format!("mean {:.0} us", report.cold_nginx_us),
    ]);
    let lines: String = table.lines().map(|line| format!("{}\n", line.trim_end())).collect();
    format!(
        "\n{lines}\nadded by the proxy, p50/p99: ours {:.0} / {:.0} us, nginx {:.0} / {:.0} us\n",
        report.app_added_p50_us, report.app_added_p99_us, report.nginx_added_p50_us, report.nginx_added_p99_us,
    )
}
