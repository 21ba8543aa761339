"""The same servicers, served over different transports."""
