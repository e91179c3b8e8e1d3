"""What people see: tables, sizes, the live line, the streams, the log, trackers; text of others made harmless."""
