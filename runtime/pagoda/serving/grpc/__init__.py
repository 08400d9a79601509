"""The gRPC port: inference, health, reflection."""
