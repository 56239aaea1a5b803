"""Work that is spread over processes and machines by Ray, which no other room imports."""
