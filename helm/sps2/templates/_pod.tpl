{{/* What all pods of the chart have in common. `c` is the component's part of the values. */}}

{{/* After the last second of this the kubelet kills. Stopping takes, beside preStop, drain and grace, at most 5 s for
     tasks that resist, 5 s for the engine and 5 s to leave the group; the rest is margin. */}}
{{- define "sps2.gracePeriod" -}}
{{ add .preStopSeconds (ceil .drainSeconds) (ceil .graceSeconds) 20 }}
{{- end }}

{{- define "sps2.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "sps2.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "sps2.metadata" -}}
{{- with .c.podAnnotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
labels:
  {{- include "sps2.labels" . | nindent 2 }}
  {{- with .c.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* Everything of a pod's spec but containers and volumes. */}}
{{- define "sps2.podCommon" -}}
serviceAccountName: {{ include "sps2.serviceAccount" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext: {{- include "sps2.podSecurity" . | nindent 2 }}
terminationGracePeriodSeconds: {{ include "sps2.gracePeriod" .c }}
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .c.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .c.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .c.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .c.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .c.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .c.spread.topologyKey }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: {{ $.c.spread.whenUnsatisfiable }}
    labelSelector:
      matchLabels: {{- include "sps2.selector" $ | nindent 8 }}
{{- end }}
{{- end }}

{{/* TLS of `root`, for a container that listens on `port`: flags, ports beside gRPC's, mount and volume. */}}
{{- define "sps2.tlsFlags" -}}
{{- if .root.Values.tls.secret }}
- --tls-cert=/etc/sps2-tls/tls.crt
- --tls-key=/etc/sps2-tls/tls.key
- --tls-ca=/etc/sps2-tls/ca.crt
- {{ printf "--tls-server-name=%s" .root.Values.tls.serverName | quote }}
- --health-port={{ include "sps2.probePort" . }}
{{- end }}
{{- end }}

{{- define "sps2.healthPort" -}}
{{- if .root.Values.tls.secret }}
- {name: {{ .name }}, containerPort: {{ include "sps2.probePort" . }}}
{{- end }}
{{- end }}

{{- define "sps2.tlsMount" -}}
{{- if .Values.tls.secret }}
- {name: tls, mountPath: /etc/sps2-tls, readOnly: true}
{{- end }}
{{- end }}

{{- define "sps2.tlsVolume" -}}
{{- with .Values.tls.secret }}
- name: tls
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end }}

{{/* Metrics of the `index`-th container of a pod of `root`: flag and port. */}}
{{- define "sps2.metricsFlag" -}}
{{- if .root.Values.metrics.enabled }}
- --metrics-port=0.0.0.0:{{ add (int (include "sps2.port" "metrics")) .index }}
{{- end }}
{{- end }}

{{- define "sps2.metricsPort" -}}
{{- if .root.Values.metrics.enabled }}
- {name: {{ include "sps2.metricsPortName" .index }}, containerPort: {{ add (int (include "sps2.port" "metrics")) .index }}}
{{- end }}
{{- end }}

{{- define "sps2.metricsPortName" -}}
{{- ternary "metrics" (printf "metrics-%d" (int .)) (eq (int .) 0) -}}
{{- end }}

{{/* How many containers of ours a pod of the component with these values has. */}}
{{- define "sps2.containersOfPod" -}}
{{- ternary (int .ranks) 1 (and (hasKey . "ranks") (eq (default "" .placement) "pod")) -}}
{{- end }}

{{/* Where probes ask: Kubernetes' gRPC probes speak no TLS. */}}
{{- define "sps2.probePort" -}}
{{- ternary (add (int .port) 1000) (int .port) (not (empty .root.Values.tls.secret)) -}}
{{- end }}

{{/* What a Service says of its gRPC port. */}}
{{- define "sps2.appProtocol" -}}
{{- ternary "https" "kubernetes.io/h2c" (not (empty .Values.tls.secret)) -}}
{{- end }}

{{/* Lifecycle and probes of a container whose health is asked on `port`. The liveness service answers while the process
     lives; the empty one says whether it can serve, which a rank that waits for its group cannot. */}}
{{- define "sps2.lifecycle" -}}
{{- with .c.preStopSeconds }}
lifecycle:
  preStop:
    sleep: {seconds: {{ int . }}}
{{- end }}
startupProbe:
  grpc: {port: {{ .port }}, service: liveness}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ div (add .c.startupSeconds 4) 5 }}
livenessProbe:
  grpc: {port: {{ .port }}, service: liveness}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  grpc: {port: {{ .port }}}
  periodSeconds: 3
  timeoutSeconds: 3
  failureThreshold: 2
{{- end }}

{{/* The environment that every process needs where only /tmp can be written, then the operator's own. */}}
{{- define "sps2.env" -}}
- {name: HOME, value: /tmp}
- {name: XDG_CACHE_HOME, value: /tmp/cache}
{{- with .root.Values.tracing.otlpEndpoint }}
- {name: SPS2_OTLP_ENDPOINT, value: {{ . | quote }}}
- {name: SPS2_TRACE_SAMPLE_RATIO, value: {{ $.root.Values.tracing.sampleRatio | quote }}}
{{- end }}
{{- range $name, $value := .c.env }}
- {name: {{ $name }}, value: {{ include "sps2.scalar" $value | quote }}}
{{- end }}
{{- end }}

{{- define "sps2.envFrom" -}}
{{- with .c.envFrom }}
envFrom: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The model folder: mount, volume, and the container that fills it. */}}
{{- define "sps2.modelMount" -}}
{{- if ne .Values.model.source "image" }}
- {name: model, mountPath: /models, readOnly: true}
{{- end }}
{{- end }}

{{- define "sps2.modelVolume" -}}
{{- if eq .Values.model.source "pvc" }}
- name: model
  persistentVolumeClaim: {claimName: {{ .Values.model.pvc.claim }}, readOnly: true}
{{- else if eq .Values.model.source "download" }}
- name: model
  emptyDir: {sizeLimit: {{ .Values.model.download.size }}}
{{- end }}
{{- end }}

{{- define "sps2.modelDownload" -}}
{{- $download := .root.Values.model.download -}}
{{- if eq .root.Values.model.source "download" }}
initContainers:
  - name: download
    image: {{ include "sps2.image" . }}
    imagePullPolicy: {{ .root.Values.images.pullPolicy }}
    command: [hf, download]
    args:
      - {{ $download.repo | quote }}
      - {{ printf "--revision=%s" $download.revision | quote }}
      - {{ printf "--local-dir=%s" (include "sps2.modelPath" .root) | quote }}
      # Only safetensors are read; repositories often hold the same weights in other formats too.
      - --exclude=*.bin
      - --exclude=*.pth
      - --exclude=*.gguf
      {{- if and .root.Values.model.hash (eq .component "router") }}
      - --exclude=*.safetensors
      {{- end }}
    env:
      - {name: HOME, value: /tmp}
      # Each file is fetched once: a cache of its chunks (10 GB) would only fill /tmp, and end the pod.
      - {name: HF_XET_CHUNK_CACHE_SIZE_BYTES, value: "0"}
      {{- with $download.tokenSecret.name }}
      - name: HF_TOKEN
        valueFrom:
          secretKeyRef: {name: {{ . }}, key: {{ $download.tokenSecret.key }}}
      {{- end }}
    resources:
      requests: {cpu: 500m, memory: 512Mi}
      limits: {memory: 2Gi}
    securityContext: {{- include "sps2.containerSecurity" . | nindent 6 }}
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      - {name: model, mountPath: /models}
{{- end }}
{{- end }}
