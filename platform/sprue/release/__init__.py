"""Who is champion: the promotion test, aliases, the audit log, and reproducing a version."""
