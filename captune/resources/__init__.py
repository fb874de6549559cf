"""What the client can ask for: one file for each resource, all of them in captune.client.Client."""
