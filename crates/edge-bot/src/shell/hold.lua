-- Holds a new connection for the primary while no server of that backend is up, for a bounded time: a switchover is a
-- pause for those who connect, not an error. It asks nobody but the proxy itself, so it works without the bot, too.

-- Between two looks; held connections look, all others never come here. Not shorter: HAProxy 2.6 forgets to wake an
-- action whose sleep is over by the time that it goes to sleep, as when the kernel gave the processor to somebody else
-- for that long. A look that is forgotten is made when the inspect-delay of the configuration ends, which is our hold.
local LOOK_MS = 50

local hold_ms = tonumber(os.getenv("EDGE_HOLD_MS")) or 0

-- HAProxy's own clock, in its own whole milliseconds: once its inspect-delay is over, so is our hold, and an action that
-- went to sleep then would be an error to HAProxy.
local function now_ms()
    local now = core.now()
    return now.sec * 1000 + now.usec // 1000
end

core.register_action("hold", { "tcp-req" }, function(txn)
    local until_ms = now_ms() + hold_ms
    while txn.f:nbsrv("primary") == 0 do
        local left_ms = until_ms - now_ms()
        if left_ms <= 0 then
            return
        end
        core.msleep(math.min(LOOK_MS, left_ms))
    end
end)
