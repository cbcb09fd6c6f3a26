//! `/liveness`: whether the machine's loop turns. A supervisor restarts a bot of which it does not.

use std::time::Duration;

use axum::{Json, extract::State as Extract, http::StatusCode, response::IntoResponse, response::Response};
use bots_core::{
    machine::Span,
    shell::{Clock, Pulse},
};

use super::{Site, show};
use crate::machine::{Role, State};

/// An idle loop that is asked to turn does so within a millisecond. Short beside the patience of whoever checks.
const TURNS_WITHIN: Duration = Duration::from_millis(200);

/// How often it is looked at until then.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// `GET /liveness`: 200 if the loop has turned within `ttl`, of a member that does not lead within twice that; always in a pause.
pub(super) async fn answer(Extract(site): Extract<Site>) -> Response {
    let state = site.state();
    let good = state.dynamic().pause || turns(&site.inner.pulse, allowed(&state)).await;
    let code = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(show::body(&site, &state, state.server(), Clock::now()))).into_response()
}

fn allowed(state: &State) -> Span {
    state.dynamic().ttl.times(if state.role() == Role::Primary { 1 } else { 2 })
}

/// Whether the loop has turned within `allowed`. One that has not for half of it may only have nothing to do: it is asked to.
async fn turns(pulse: &Pulse, allowed: Span) -> bool {
    let since = || Clock::now().since(pulse.last());
    let turned = async {
        while since() >= allowed.divided_by(2) {
            pulse.ask();
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    let _in_time = tokio::time::timeout(TURNS_WITHIN, turned).await;
    since() < allowed
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bots_core::{machine::Span, shell::Pulse};

    use super::turns;

    #[tokio::test]
    async fn a_loop_that_stands_still_is_told_from_one_that_has_nothing_to_do() {
        let (pulse, allowed) = (Pulse::new(), Span::from_millis(400));
        assert!(turns(&pulse, allowed).await, "it has just turned");
        tokio::time::sleep(Duration::from_millis(300)).await;
        let idle = pulse.clone();
        let turned = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(50)).await;
            idle.beat();
        });
        assert!(turns(&pulse, allowed).await, "it turns when it is asked");
        turned.await.expect("it turns");
        tokio::time::sleep(Duration::from_millis(410)).await;
        assert!(!turns(&pulse, allowed).await, "it stands still");
        pulse.beat();
        assert!(turns(&pulse, allowed).await, "it turns again");
    }
}
