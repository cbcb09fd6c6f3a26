//! Copies of a leader's logical slots: asking it for them, fetching their files, and putting those into a data directory that no server
//! uses.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail};
use bots_core::wire::Lsn;
use serde::Deserialize;

use super::{conninfo::Conninfo, files, hands::Hands, node::Node, quote::literal, tool::clean_command};
use crate::machine::{LeaderSlot, LeaderSlots, Upstream, Xid};

/// The leader gets this long to answer: these are short questions, and they are asked again.
const DEADLINE: Duration = Duration::from_secs(10);

/// A slot's file has some 200 bytes; what is much larger is not one.
const STATE_BYTES_MAX: usize = 64 * 1024;

/// The file of a slot, in its directory below `pg_replslot`.
const STATE: &str = "state";

/// Where Postgres keeps slots.
const SLOTS_DIR: &str = "pg_replslot";

/// Beside the fetched files: of which leader they are. No slot has such a name.
const OF: &str = ".of";

/// How the file of a slot begins, and what its head says: this number, a checksum, a version, and the length of the rest; each has
/// four bytes in the machine's order (`ReplicationSlotOnDisk` in Postgres). Beside a file that is none, no server starts.
const MAGIC: u32 = 0x0105_1CA1;
/// See [`MAGIC`].
const HEAD_BYTES: usize = 16;

#[derive(Debug, Deserialize)]
struct Row {
    confirmed: u64,
    catalog_xmin: u32,
}

/// Asks `leader` how far it keeps the catalog for our slot `own`, and then for the slots `names`; fetches the files of those
/// named in `fetch`.
///
/// # Errors
/// If it cannot be asked, or does not lead.
pub(super) async fn look(
    hands: &Arc<Hands>,
    leader: &Upstream,
    own: &str,
    names: &[String],
    fetch: &[String],
) -> anyhow::Result<LeaderSlots> {
    let list = |names: &[String]| names.iter().map(|name| literal(name)).collect::<Vec<_>>().join(", ");
    let feedback = format!(
        "SELECT COALESCE((SELECT catalog_xmin::text FROM pg_replication_slots \
          WHERE slot_type = 'physical' AND slot_name = {} AND NOT pg_is_in_recovery()), '')",
        literal(own)
    );
    let slots = format!(
        "SELECT COALESCE(json_object_agg(slot_name, json_build_object(\
                'confirmed', pg_wal_lsn_diff(confirmed_flush_lsn, '0/0')::int8, \
                'catalog_xmin', catalog_xmin::text::int8)), '{{}}') \
           FROM pg_replication_slots \
          WHERE slot_type = 'logical' AND NOT temporary AND slot_name IN ({}) AND NOT pg_is_in_recovery() \
            AND confirmed_flush_lsn IS NOT NULL AND catalog_xmin IS NOT NULL",
        list(names)
    );
    // Later than the slots: a file is never ahead of what was confirmed by then, and it is the older one that counts.
    let states = format!(
        "SELECT COALESCE(json_object_agg(slot_name, encode(pg_read_binary_file(\
                '{SLOTS_DIR}/' || slot_name || '/{STATE}', 0, {STATE_BYTES_MAX}, true), 'hex')), '{{}}') \
           FROM pg_replication_slots \
          WHERE slot_type = 'logical' AND slot_name IN ({}) AND NOT pg_is_in_recovery()",
        list(fetch)
    );
    let mut questions = vec![feedback, slots];
    if !fetch.is_empty() {
        questions.push(states);
    }
    let said = tokio::time::timeout(DEADLINE, ask(hands, leader, &questions)).await.context("it takes too long")??;
    let mut answers = said.lines();
    let mut next = || answers.next().map(str::trim).context("it answers less than it was asked");
    let feedback = match next()? {
        "" => None,
        number => Some(Xid(number.parse().context("read the number of a transaction")?)),
    };
    let rows: BTreeMap<String, Row> = serde_json::from_str(next()?).context("read the slots")?;
    let fetched = if fetch.is_empty() {
        Vec::new()
    } else {
        let states: BTreeMap<String, Option<String>> =
            serde_json::from_str(next()?).context("read the files of slots")?;
        let known = states.into_iter().filter_map(|(name, state)| Some((name, state?)));
        let wanted: BTreeMap<String, String> = known.filter(|(name, _)| fetch.contains(name)).collect();
        let leader = leader.name.clone();
        hands.on_disk(move |hands| keep(&hands.node, &leader, &wanted)).await?
    };
    let slot = |row: Row| LeaderSlot { confirmed: Lsn(row.confirmed), catalog_xmin: Xid(row.catalog_xmin) };
    let slots = rows.into_iter().map(|(name, row)| (name, slot(row))).collect();
    Ok(LeaderSlots { feedback, slots, fetched })
}

/// Asks by `psql`, which knows all ways to encrypt and to log in that replication knows.
async fn ask(hands: &Arc<Hands>, leader: &Upstream, questions: &[String]) -> anyhow::Result<String> {
    let node = &hands.node;
    hands.on_disk(|hands| files::write_passfile(&hands.node)).await?;
    let conninfo = Conninfo::new(leader, node.rewinder())?.passfile(&node.passfile()).database("postgres");
    let conninfo = conninfo.application_name(&format!("{}-slots", node.name));
    let mut command = clean_command(node.binaries.program("psql"));
    command.args(["--no-psqlrc", "--no-align", "--tuples-only", "--quiet", "--no-password"]);
    command.args(["--set", "ON_ERROR_STOP=1"]).arg(conninfo.to_string()).env("LC_ALL", "C");
    for question in questions {
        command.args(["--command", question]);
    }
    let output = hands.tools.run(command).await?;
    String::from_utf8(output.stdout).context("read what psql says")
}

/// Where fetched files wait for the next start.
fn waiting(node: &Node) -> PathBuf {
    node.run_dir.join("slots")
}

/// Keeps fetched files for the next start; says whose.
fn keep(node: &Node, leader: &str, states: &BTreeMap<String, String>) -> anyhow::Result<Vec<String>> {
    let dir = waiting(node);
    discard(&dir)?;
    files::private_dir(&dir)?;
    for (name, state) in states {
        let bytes = from_hex(state).and_then(whole).with_context(|| format!("the file of the slot {name}"))?;
        fs::write(dir.join(name), bytes).with_context(|| format!("write {}", dir.join(name).display()))?;
    }
    // Last: what has no owner is not whole.
    let of = dir.join(OF);
    fs::write(&of, leader).with_context(|| format!("write {}", of.display()))?;
    Ok(states.keys().cloned().collect())
}

/// Puts what was fetched from `leader` into the data directory, where it has no such slot; forgets it in any case.
///
/// # Errors
/// If the disk does not take it.
pub(super) fn install(node: &Node, leader: Option<&str>) -> anyhow::Result<()> {
    let dir = waiting(node);
    let of = match fs::read_to_string(dir.join(OF)) {
        Ok(of) => of,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return discard(&dir),
        Err(e) => return Err(e).with_context(|| format!("read {}", dir.display())),
    };
    if leader == Some(of.as_str()) {
        for entry in fs::read_dir(&dir).with_context(|| format!("read {}", dir.display()))? {
            let entry = entry?;
            let name = entry.file_name();
            let slot = node.data_dir.join(SLOTS_DIR).join(&name);
            if name == OF || slot.exists() {
                continue;
            }
            place(&entry.path(), &slot).with_context(|| format!("make {}", slot.display()))?;
            tracing::info!(slot = %name.display(), leader = of, "a copy of a logical slot was put in place");
        }
    }
    discard(&dir)
}

/// Makes a slot's directory of its file, in one piece: the server removes what has the other name, and does not start beside a
/// directory without a file.
fn place(state: &Path, slot: &Path) -> anyhow::Result<()> {
    let draft = slot.with_extension("tmp");
    discard(&draft)?;
    files::private_dir(&draft)?;
    fs::copy(state, draft.join(STATE))?;
    File::open(draft.join(STATE))?.sync_all()?;
    File::open(&draft)?.sync_all()?;
    fs::rename(&draft, slot)?;
    Ok(files::sync_dir_of(slot)?)
}

fn discard(dir: &Path) -> anyhow::Result<()> {
    match fs::remove_dir_all(dir) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).with_context(|| format!("remove {}", dir.display())),
    }
}

/// The bytes, if they are a slot's file from its first to its last.
fn whole(bytes: Vec<u8>) -> anyhow::Result<Vec<u8>> {
    let number = |at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
    let length = number(HEAD_BYTES - 4).and_then(|length| usize::try_from(length).ok());
    if number(0) != Some(MAGIC) || length != Some(bytes.len() - HEAD_BYTES) {
        bail!("it is not one of a server such as ours");
    }
    Ok(bytes)
}

fn from_hex(text: &str) -> anyhow::Result<Vec<u8>> {
    if text.is_empty() || !text.len().is_multiple_of(2) {
        bail!("it is not whole");
    }
    let pair = |at: usize| text.get(at..at + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok());
    (0..text.len()).step_by(2).map(|at| pair(at).context("it is not written in hex digits")).collect()
}

#[cfg(test)]
mod tests {
    use super::{HEAD_BYTES, MAGIC, from_hex, whole};

    #[test]
    fn what_is_not_a_whole_file_of_a_slot_is_refused() {
        let mut file = Vec::from(MAGIC.to_ne_bytes());
        file.resize(HEAD_BYTES - 4, 0);
        file.extend(3_u32.to_ne_bytes());
        file.extend([7, 8, 9]);
        let hex: String = file.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(from_hex(&hex).and_then(whole).expect("a whole one"), file);
        for wrong in ["", "0", "zz", &hex[2..], &hex[..hex.len() - 2], &format!("{hex}00")] {
            assert!(from_hex(wrong).and_then(whole).is_err(), "{wrong:?}");
        }
    }
}
