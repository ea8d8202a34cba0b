"""The SDK: Client, AsyncClient and their errors. Imports only the wire."""
