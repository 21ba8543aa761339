"""Front doors: API gateways ask here, in their own protocols, whether a request may pass, and it is charged."""
