//! `botctl content`, carried out: reads, asks, writes one transaction, and waits for what it shall bring about.

use bots_core::{dcs::Scope, machine::Span, shell::Clock, wire::ContentRevision};

use crate::{
    act::{REDRAW_INTERVAL, confirm, explain, print},
    args::{Content, Format},
    content::{self, Plan},
    failure::Failure,
    store::Store,
};

/// Carries out a command.
pub(crate) async fn act(store: &Store, asked: &Content, format: Format) -> Result<(), Failure> {
    let scope = store.scope(asked.scope())?;
    let view = store.scope_view(&scope).await?;
    match asked {
        Content::List { .. } => print(&content::render(scope.name(), &view, Clock::unix_ms(), format)?),
        Content::Why { commit: Some(commit), .. } => print(&content::why(scope.name(), &view, commit)?),
        Content::Why { commit: None, .. } => match view.leader() {
            Some(leader) => explain(store, &format!("{}/{leader}", scope.name()), format).await,
            None => Err(Failure::failed(format!("nobody leads {}: no content bot looks after it", scope.name()))),
        },
        Content::Promote { .. }
        | Content::Rollback { .. }
        | Content::Pin { .. }
        | Content::Unpin { .. }
        | Content::Unquarantine { .. } => {
            let plan = Plan::new(&scope, &view, asked, Clock::unix_ms())?;
            if plan.asks && !asked.is_forced() {
                confirm(&format!("{}?", plan.meaning))?;
            }
            carry_out(store, &scope, &plan, asked.patience()).await
        }
    }
}

async fn carry_out(store: &Store, scope: &Scope, plan: &Plan, patience: Span) -> Result<(), Failure> {
    let changed = format!("{} has changed in the meantime: nothing was asked; try again", scope.name());
    let asked_at = store.write(&plan.transaction, &changed).await?;
    let Some(wanted) = &plan.live else { return print(&format!("{}\n", plan.meaning)) };
    let start = Clock::now();
    let mut followed = store.follow_scope(scope);
    loop {
        followed.changed(REDRAW_INTERVAL).await;
        let now = Clock::now();
        let fleet = followed.fleet(store);
        let seen = fleet.scopes.get(scope.name()).filter(|_| followed.revision() >= asked_at);
        let live = seen.and_then(|view| view.json::<ContentRevision>("revision/live")).map(|live| live.sha);
        if live.as_ref() == Some(wanted) {
            return print(&format!("{}: live after {}\n", plan.meaning, now.since(start)));
        }
        if now >= start + patience {
            let name = scope.name();
            return Err(Failure::failed(format!(
                "{wanted} is not live in {name} after {patience}: the request stands, and `botctl content why {name}` says what it waits for"
            )));
        }
    }
}
