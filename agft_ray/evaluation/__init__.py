"""Running policies in virtual time and replaying traces against an endpoint."""
