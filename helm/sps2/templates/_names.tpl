{{/* Names, labels, images, flags. Every template below takes the root context, or (dict "root" $ ...). */}}

{{- define "sps2.fullname" -}}
{{- $chart := default .Chart.Name .Values.nameOverride -}}
{{- $both := ternary .Release.Name (printf "%s-%s" .Release.Name $chart) (contains $chart .Release.Name) -}}
{{- default $both .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "sps2.serviceAccount" -}}
{{- default (ternary (include "sps2.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name -}}
{{- end }}

{{/* What selects the pods of `component`. */}}
{{- define "sps2.selector" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "sps2.labels" -}}
{{ include "sps2.selector" . }}
app.kubernetes.io/part-of: sps2
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Reference of `image`: by digest where there is one. */}}
{{- define "sps2.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ default .root.Chart.AppVersion .image.tag }}
{{- end -}}
{{- end }}

{{/* The values that a component shares with every other. Whole numbers stay whole: Helm reads them as floats. */}}
{{- define "sps2.scalar" -}}
{{- if kindIs "float64" . -}}
{{- ternary (int64 . | toString) (toString .) (eq (floor .) .) -}}
{{- else -}}
{{- toString . -}}
{{- end -}}
{{- end }}

{{/* A map of flags as list items of `args`. */}}
{{- define "sps2.flags" -}}
{{- range $name, $value := . }}
{{- if kindIs "bool" $value }}
- --{{ ternary "" "no-" $value }}{{ $name }}
{{- else }}
- {{ printf "--%s=%s" $name (include "sps2.scalar" $value) | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* Ports, the same in every release: a component has its own address. */}}
{{- define "sps2.port" -}}
{{- get (dict "router" "50051" "directory" "50060" "prefill" "50070" "decode" "50080" "redis" "6379" "metrics" "9090") . -}}
{{- end }}

{{- define "sps2.directoryAddress" -}}
{{ include "sps2.fullname" . }}-directory:{{ include "sps2.port" "directory" }}
{{- end }}

{{/* Folder of the model inside the containers. */}}
{{- define "sps2.modelPath" -}}
{{- $model := .Values.model -}}
{{- if eq $model.source "image" -}}
/opt/sps2/models/demo
{{- else if eq $model.source "pvc" -}}
/models{{ with $model.pvc.path }}/{{ . }}{{ end }}
{{- else -}}
/models/{{ base $model.download.repo }}
{{- end -}}
{{- end }}

{{/* Secret and key of the Redis password, as JSON; an empty name where there is none. */}}
{{- define "sps2.redisPassword" -}}
{{- $given := .Values.redis.passwordSecret -}}
{{- if or $given.name .Values.redis.url -}}
{{ toJson $given }}
{{- else -}}
{{ dict "name" (printf "%s-redis" (include "sps2.fullname" .)) "key" "password" | toJson }}
{{- end -}}
{{- end }}
