"""The service proxy and policy engine. Not built yet: Services and NetworkPolicies are the work of later releases."""
