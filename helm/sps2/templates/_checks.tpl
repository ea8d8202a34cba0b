{{/* What relates values to each other; values.schema.json has checked each by itself. */}}

{{- define "sps2.checks" -}}
{{- $v := .Values -}}
{{- if and (eq $v.model.source "pvc") (not $v.model.pvc.claim) }}
{{- fail "model.pvc.claim is required with model.source=pvc: the PersistentVolumeClaim that holds the model" }}
{{- end }}
{{- if and (eq $v.model.source "pvc") (not $v.model.pvc.path) (not $v.model.name) }}
{{- fail "model.name is required while model.pvc.path is empty: there is no folder name to serve it under" }}
{{- end }}
{{- if and (eq $v.model.source "download") (not $v.model.download.repo) }}
{{- fail "model.download.repo is required with model.source=download: a repository on the Hugging Face hub" }}
{{- end }}
{{- if and $v.attention.file (ne $v.attention.profile "default") }}
{{- fail "attention.profile and attention.file exclude each other: leave attention.profile at default" }}
{{- end }}
{{- if and $v.router.ingress.enabled (not $v.router.ingress.host) }}
{{- fail "router.ingress.host is required with router.ingress.enabled" }}
{{- end }}
{{- if and $v.router.ingress.enabled (not $v.router.ingress.tlsSecret) }}
{{- fail "router.ingress.tlsSecret is required with router.ingress.enabled: gRPC through an Ingress needs TLS" }}
{{- end }}
{{- if and $v.router.grpcRoute.enabled (not $v.router.grpcRoute.parentRefs) }}
{{- fail "router.grpcRoute.parentRefs is required with router.grpcRoute.enabled: the Gateway to attach to" }}
{{- end }}
{{- if and $v.router.authTokens.testToken.name (not $v.router.authTokens.secret.name) }}
{{- fail "router.authTokens.testToken needs router.authTokens.secret: without that every caller is let in" }}
{{- end }}
{{- if and $v.monitoring.podMonitor.enabled (not $v.metrics.enabled) }}
{{- fail "monitoring.podMonitor.enabled needs metrics.enabled: there is nothing to scrape" }}
{{- end }}
{{- range $name := list "router" "prefill" "decode" }}
{{- $scaling := (get $v $name).autoscaling }}
{{- if and (ne $scaling.kind "none") (gt (int $scaling.min) (int $scaling.max)) }}
{{- fail (printf "%s.autoscaling.min (%d) is more than max (%d)" $name (int $scaling.min) (int $scaling.max)) }}
{{- end }}
{{- if and (eq $scaling.kind "keda") (not $scaling.triggers) (not (compact (values $scaling.signals))) }}
{{- fail (printf "%s.autoscaling.signals are all 0, and there are no triggers: kind=keda needs one of them" $name) }}
{{- end }}
{{- end }}
{{- range $name := list "prefill" "decode" }}
{{- $pool := get $v $name }}
{{- if and (eq $pool.placement "statefulset") (ne $pool.autoscaling.kind "none") }}
{{- fail (printf "%s.autoscaling.kind=%s needs placement pod or lws: with statefulset a group is an object of its own" $name $pool.autoscaling.kind) }}
{{- end }}
{{- if and $pool.exclusiveTopologyKey (ne $pool.placement "lws") }}
{{- fail (printf "%s.exclusiveTopologyKey needs placement=lws" $name) }}
{{- end }}
{{- if and (eq $pool.placement "pod") (gt (int $pool.ranks) 16) }}
{{- fail (printf "%s.ranks=%d is more than 16, the most that placement=pod puts into one pod; use lws" $name (int $pool.ranks)) }}
{{- end }}
{{- $tp := int (default 1 $pool.flags.tp) }}
{{- if mod (int $pool.ranks) $tp }}
{{- fail (printf "%s.ranks=%d is not a multiple of %s.flags.tp=%d" $name (int $pool.ranks) $name $tp) }}
{{- end }}
{{- end }}
{{- end }}
