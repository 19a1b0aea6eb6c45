"""Images in registries (OCI distribution-spec 1.1, and Docker's Registry HTTP API V2). Imported when one is asked."""
