{{/* Everything here takes a scope: .Values of this chart and .Release. `entitlement-gateway.scope` makes one, in this
     chart as in one that depends on it. */}}
{{- define "entitlement-gateway.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains "entitlement-gateway" .Release.Name -}}
{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-entitlement-gateway" (.Release.Name | trunc 20 | trimSuffix "-") }}
{{- end -}}
{{- end -}}

{{- define "entitlement-gateway.image" -}}
{{- with .Values.image -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag }}{{ end -}}
{{- end -}}
{{- end -}}

{{/* What selects a component's pods: (list scope component). */}}
{{- define "entitlement-gateway.selector" -}}
app.kubernetes.io/name: entitlement-gateway
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "entitlement-gateway.labels" -}}
{{ include "entitlement-gateway.selector" . }}
{{- $scope := index . 0 }}
app.kubernetes.io/managed-by: {{ $scope.Release.Service }}
app.kubernetes.io/version: {{ $scope.Values.image.tag | quote }}
helm.sh/chart: entitlement-gateway
{{- end -}}

{{/* Name and key of a Secret; the trial brings its own. */}}
{{- define "entitlement-gateway.redisSecret" -}}
{{- if .Values.trial.enabled -}}
name: {{ include "entitlement-gateway.fullname" . }}-trial
key: redis-url
{{- else -}}
name: {{ required "redis.urlSecret.name is needed: the Secret with the URL of Redis (or trial.enabled)" .Values.redis.urlSecret.name }}
key: {{ .Values.redis.urlSecret.key }}
{{- end -}}
{{- end -}}

{{/* The same for ledger_sync, which may have a user of its own. */}}
{{- define "entitlement-gateway.redisSecret.sync" -}}
{{- $own := .Values.redis.ledgerSyncUrlSecret -}}
{{- if and $own.name (not .Values.trial.enabled) -}}
name: {{ $own.name }}
key: {{ $own.key }}
{{- else -}}
{{ include "entitlement-gateway.redisSecret" . }}
{{- end -}}
{{- end -}}

{{/* Takes a prefix and a scope. */}}
{{- define "entitlement-gateway.redisTls" -}}
{{- $prefix := index . 0 -}}
{{- $tls := (index . 1).Values.redis.tls -}}
{{- if $tls.secretName }}
- name: {{ $prefix }}_REDIS_CA
  value: /etc/entitlement/redis/ca.crt
{{- if $tls.clientCertificate }}
- name: {{ $prefix }}_REDIS_CERT
  value: /etc/entitlement/redis/tls.crt
- name: {{ $prefix }}_REDIS_KEY
  value: /etc/entitlement/redis/tls.key
{{- end }}
{{- end }}
{{- end -}}

{{- define "entitlement-gateway.databaseSecret" -}}
{{- if .Values.trial.enabled -}}
name: {{ include "entitlement-gateway.fullname" . }}-trial
key: database-url
{{- else -}}
name: {{ required "postgresql.urlSecret.name is needed: the Secret with the URL of PostgreSQL (or trial.enabled)" .Values.postgresql.urlSecret.name }}
key: {{ .Values.postgresql.urlSecret.key }}
{{- end -}}
{{- end -}}

{{/* Whether a process asks nobody who it is: (list scope process), of gateway and sync. */}}
{{- define "entitlement-gateway.open" -}}
{{- $anonymous := (index . 0).Values.access.anonymous -}}
{{- if or (eq $anonymous "all") (eq $anonymous (index . 1)) }}true{{ end -}}
{{- end -}}

{{/* Who may call, as variables; and the volume and its mount that they need: (list scope process). */}}
{{- define "entitlement-gateway.access.env" -}}
{{- $access := (index . 0).Values.access }}
{{- $prefix := printf "ENTITLEMENT_%s" (upper (index . 1)) }}
{{- if include "entitlement-gateway.open" . }}
- name: {{ $prefix }}_ANONYMOUS
  value: all
{{- else }}
- name: {{ $prefix }}_ACCESS
  value: /etc/entitlement/access/{{ $access.key }}
{{- $_ := required "access.secretName is needed: the Secret with the file of identities, who may call (or access.anonymous: all)" $access.secretName }}
{{- end }}
{{- end -}}

{{- define "entitlement-gateway.access.mount" -}}
{{- if not (include "entitlement-gateway.open" .) }}
- {name: entitlement-access, mountPath: /etc/entitlement/access, readOnly: true}
{{- end }}
{{- end -}}

{{/* Its hashes let nobody in, and a pod of an application has no group of ours: whoever mounts it may read it. */}}
{{- define "entitlement-gateway.access.volume" -}}
{{- if not (include "entitlement-gateway.open" .) }}
- name: entitlement-access
  secret: {secretName: {{ (index . 0).Values.access.secretName | quote }}, defaultMode: 0444}
{{- end }}
{{- end -}}

{{/* Settings as variables: (list prefix settings). Numbers are whole: Helm reads them as floats. */}}
{{- define "entitlement-gateway.settings" -}}
{{- $prefix := index . 0 -}}
{{- range $name, $value := index . 1 }}
- name: {{ $prefix }}_{{ upper $name }}
  value: {{ if kindIs "float64" $value }}{{ int64 $value | quote }}{{ else }}{{ $value | quote }}{{ end }}
{{- end }}
{{- end -}}

{{- define "entitlement-gateway.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ int64 .Values.runAsUser }}
runAsGroup: {{ int64 .Values.runAsUser }}
fsGroup: {{ int64 .Values.runAsUser }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "entitlement-gateway.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: {{ int64 .Values.runAsUser }}
runAsGroup: {{ int64 .Values.runAsUser }}
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* What every pod of ours has. Without service links: nobody needs a variable for each Service there is. */}}
{{- define "entitlement-gateway.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.serviceAccountName }}
serviceAccountName: {{ . }}
{{- end }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
securityContext: {{ include "entitlement-gateway.podSecurity" . | nindent 2 }}
{{- end -}}

{{/* Where pods go: (list scope component options). */}}
{{- define "entitlement-gateway.placement" -}}
{{- $labels := include "entitlement-gateway.selector" (list (index . 0) (index . 1)) -}}
{{- with index . 2 }}
{{- with .nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}
topologySpreadConstraints:
{{- range $key := list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - topologyKey: {{ $key }}
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{ $labels | nindent 8 }}
{{- end }}
{{- end -}}

{{/* Seconds that a gateway may take to end: callers learn of it, calls finish, Envoy and the receipts are closed. */}}
{{- define "entitlement-gateway.gracePeriod" -}}
{{- $drain := 5000 -}}
{{- if hasKey .Values.gateway.settings "drain_ms" }}{{ $drain = int64 .Values.gateway.settings.drain_ms }}{{ end -}}
{{- $announce := int64 (default 0 .Values.gateway.settings.announce_ms) -}}
{{ add (int64 .Values.gateway.preStopSeconds) (ceil (divf $announce 1000)) (ceil (divf $drain 1000)) 35 }}
{{- end -}}

{{/* What cannot be said by the schema. */}}
{{- define "entitlement-gateway.check" -}}
{{- with .Values -}}
{{- if and (eq .gateway.receipts.kind "claim") (ne .mode "deployment") -}}
{{ fail "gateway.receipts.kind: claim needs mode: deployment; a daemonset or a sidecar keeps receipts on hostPath or emptyDir" }}
{{- end -}}
{{- if and .gateway.autoscaling.enabled (ne .mode "deployment") -}}
{{ fail "gateway.autoscaling.enabled needs mode: deployment" }}
{{- end -}}
{{- if and .gateway.tls.secretName (eq .mode "sidecar") -}}
{{ fail "gateway.tls.secretName is of no use with mode: sidecar; it listens on loopback alone" }}
{{- end -}}
{{- if and (eq .access.anonymous "all") .access.secretName -}}
{{ fail "access.anonymous: all lets everybody in, whatever access.secretName says; leave one of them out" }}
{{- end -}}
{{- if and .ledgerSync.tls.clientCa (not .ledgerSync.tls.secretName) -}}
{{ fail "ledgerSync.tls.clientCa needs ledgerSync.tls.secretName" }}
{{- end -}}
{{- if and .gateway.tls.clientCa (not .gateway.tls.secretName) -}}
{{ fail "gateway.tls.clientCa needs gateway.tls.secretName" }}
{{- end -}}
{{- if gt (int64 .ledgerSync.replicas) (int64 (.ledgerSync.settings.lanes | default 2)) -}}
{{ fail (printf "ledgerSync.replicas is %d: more than ledgerSync.settings.lanes, %d; each needs a lane" (int64 .ledgerSync.replicas) (int64 (.ledgerSync.settings.lanes | default 2))) }}
{{- end -}}
{{- if and .webhooks.urlSecret.name (not .webhooks.signingSecret.name) -}}
{{ fail "webhooks.signingSecret.name is needed beside webhooks.urlSecret.name: what is not signed is not sent" }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Variables of traces, where somebody takes them: (list scope prefix). */}}
{{- define "entitlement-gateway.tracing" -}}
{{- $tracing := (first .).Values.tracing -}}
{{- if $tracing.endpoint }}
- name: {{ last . }}_TRACING
  value: "true"
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ $tracing.endpoint | quote }}
- name: OTEL_TRACES_SAMPLER
  value: parentbased_traceidratio
- name: OTEL_TRACES_SAMPLER_ARG
  value: {{ $tracing.ratio | quote }}
{{- end }}
{{- end -}}
