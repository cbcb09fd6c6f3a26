vcl 4.1;

# A Varnish in front of web bots, purged by the content bot once every serving bot serves a new commit. Varnish 6.6 or newer.
# It keeps what the site's `_headers` allows it to, for example:
#     /*
#       Cache-Control: public, s-maxage=3600

import std;

backend default {
    .host = "127.0.0.1";
    .port = "8080";
}

# The content bots.
acl purgers {
    "127.0.0.1";
}

sub vcl_recv {
    if (req.method == "PURGE" || req.method == "BAN") {
        if (client.ip !~ purgers) {
            return (synth(403, "Not for you"));
        }
        # PURGE forgets one page, of the host that the request names.
        if (req.method == "PURGE") {
            return (purge);
        }
        # BAN forgets every page whose address fits the expression in x-ban.
        if (!req.http.x-ban) {
            return (synth(400, "x-ban is missing"));
        }
        if (std.ban("obj.http.x-url ~ " + req.http.x-ban)) {
            return (synth(200, "Banned"));
        }
        return (synth(400, std.ban_error()));
    }
}

sub vcl_backend_response {
    # Kept with the page, so that bans can be checked without a request.
    set beresp.http.x-url = bereq.url;
}

sub vcl_deliver {
    unset resp.http.x-url;
}
