-- Holds a new connection for the primary while no server of that backend is up, for a bounded time: a switchover is a
-- pause for those who connect, not an error. It asks nobody but the proxy itself, so it works without the bot, too.

-- Between two looks; held connections look, all others never come here.
local LOOK_MS = 10

local hold_ms = tonumber(os.getenv("EDGE_HOLD_MS")) or 0

core.register_action("hold", { "tcp-req" }, function(txn)
    local held_ms = 0
    while held_ms < hold_ms and txn.f:nbsrv("primary") == 0 do
        core.msleep(LOOK_MS)
        held_ms = held_ms + LOOK_MS
    end
end)
