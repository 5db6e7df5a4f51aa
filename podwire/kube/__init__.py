"""Kubernetes objects, and how they are followed: by list and watch, or from a folder of manifests.

    options · kubeconfig · access ──▶ credentials · plugin ──▶ client ──▶ api ──▶ batches (source)
                                                                │          ▲
                                            answers, errors (words)     follower: known · decode · lines
    folder (manifests on disk) ───────────────────────────────────────────────────▶ batches (source)

objects   the fields that are used of each kind        kinds     what is followed, and selected
source    what a consumer sees: `Source`, `Batch`      api       `ApiSource`: list, watch, pauses
follower  lists and watches into batches (pure)        client    several endpoints, errors, bytes

    access = options.access(KubeOptions(kubeconfig="…"))
    async with Client(access) as client:
        source = ApiSource(client)                     or ManifestSource([Path("manifests")])
        async for batch in source.follow(proxied_services()): ...
"""
