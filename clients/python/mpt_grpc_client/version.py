"""The version that the server and the client share; both distributions read it from here."""

__version__ = "0.2.0"
